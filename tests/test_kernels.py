"""The operators' properties beyond the golden numbers: definitions, far points, half types, memory, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fewref.kernels import deformable_attention
from fewref.kernels.affinity import affinity
from fewref.kernels.deformable_attention import ms_deform_attn, sample_by_bags, sample_by_grid
from fewref.kernels.dynamic_mask import aligned_bilinear, dynamic_mask_head, parameter_counts

SHAPES = [(5, 7), (3, 4), (1, 2)]


def random_samples(seed: int = 0, n: int = 2, q: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(n, sum(h * w for h, w in SHAPES), 4, 8, generator=generator)
    locations = torch.rand(n, q, 4, 3, 2, 2, generator=generator) * 1.6 - 0.3
    weights = torch.randn(n, q, 4, 3, 2, generator=generator)
    return value, locations, weights


def by_definition(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Corner by corner in float64, written as loops."""
    n, q, m, _, points, _ = locations.shape
    total = torch.zeros(n, q, m, value.shape[-1], dtype=torch.float64)
    starts = [0, 35, 47]
    for i, j, k, level, p in torch.cartesian_prod(*map(torch.arange, (n, q, m, 3, points))).tolist():
        h, w = SHAPES[level]
        x, y = (locations[i, j, k, level, p].double() * torch.tensor([w, h]) - 0.5).tolist()
        for row in range(h):
            for column in range(w):
                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                if share:
                    pixel = value[i, starts[level] + row * w + column, k].double()
                    total[i, j, k] += weights[i, j, k, level, p].double() * share * pixel
    return total.flatten(2)


@pytest.mark.parametrize("form", [sample_by_bags, sample_by_grid])
def test_deformable_is_its_definition(form: object) -> None:
    value, locations, weights = random_samples()
    got = form(value, SHAPES, locations, weights)
    torch.testing.assert_close(got, by_definition(value, locations, weights).float(), rtol=1e-5, atol=1e-5)


def test_deformable_gradients_in_float64() -> None:
    value, locations, weights = (t.double().requires_grad_() for t in random_samples(1, n=1, q=1))
    torch.autograd.gradcheck(lambda *args: ms_deform_attn(args[0], SHAPES, *args[1:]), (value, locations, weights))


@pytest.mark.parametrize(("channels", "queries", "wanted"), [(32, 90, "bags"), (8, 90, "grid"), (8, 5, "bags")])
def test_deformable_picks_the_form_by_size(
    channels: int, queries: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for name, form in (("bags", sample_by_bags), ("grid", sample_by_grid)):
        spy = lambda *args, name=name, form=form: used.append(name) or form(*args)  # noqa: E731
        monkeypatch.setattr(deformable_attention, f"sample_by_{name}", spy)
    shape = (1, queries, 2, 3, 2)
    value = torch.randn(1, 49, 2, channels)
    ms_deform_attn(value, SHAPES, torch.rand(*shape, 2), torch.rand(shape))
    assert used == [wanted]


def test_deformable_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    value, locations, weights = random_samples(n=5)
    whole = sample_by_bags(value, SHAPES, locations, weights)
    monkeypatch.setattr(deformable_attention, "_CHUNK", 2 * 6 * 4 * 24)
    assert torch.equal(sample_by_bags(value, SHAPES, locations, weights), whole)


def test_deformable_far_points_give_zero() -> None:
    value, locations, weights = random_samples()
    far = torch.where(locations > 0.5, 3e9, -3e9).requires_grad_()
    output = ms_deform_attn(value, SHAPES, far, weights)
    output.sum().backward()
    assert not output.any()
    assert not far.grad.any()


def test_deformable_keeps_coordinates_wide_in_half_precision() -> None:
    value, locations, weights = random_samples()
    with torch.autocast("cpu", torch.bfloat16):
        got = ms_deform_attn(value.bfloat16(), SHAPES, locations, weights)
    exact = ms_deform_attn(value.bfloat16().float(), SHAPES, locations, weights)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=1e-2, atol=1e-2)  # one rounding, at the end


def test_deformable_refuses_levels_that_do_not_fit() -> None:
    value, locations, weights = random_samples()
    with pytest.raises(ValueError, match="add up"):
        ms_deform_attn(value[:, 1:], SHAPES, locations, weights)


def test_affinity_is_a_softmax_over_the_keys() -> None:
    query, keys, values = torch.randn(2, 30, 16), torch.randn(2, 12, 16), torch.randn(2, 12, 10)
    want = (query @ keys.transpose(1, 2) / 4).softmax(-1) @ values
    torch.testing.assert_close(affinity(query, keys, values), want, rtol=1e-5, atol=1e-5)


def test_affinity_never_holds_the_matrix() -> None:
    """Channel-major tensors seen through a transpose are what the convolutions give; unfused they cost N*M floats."""
    n, m = 4096, 2048
    query, keys, values = (torch.randn(1, 64, size).transpose(1, 2) for size in (n, m, m))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        affinity(query, keys, values)
    largest = max(event.self_cpu_memory_usage for event in run.events())
    assert 0 < largest < n * m * 4 / 4


def test_dynamic_mask_head_is_a_small_network_per_query() -> None:
    n, q, c, h, w = 2, 3, 6, 4, 5
    features, references = torch.randn(n, c, h, w), torch.rand(n, q, 2) * 20
    counts, biases = parameter_counts(c, 8, 3)
    parameters = torch.randn(n, q, sum(counts) + sum(biases))
    got = dynamic_mask_head(features, parameters, references, stride=4)
    y, x = torch.meshgrid(torch.arange(h) * 4 + 2.0, torch.arange(w) * 4 + 2.0, indexing="ij")
    for i in range(n):
        for j in range(q):
            relative = references[i, j, :, None, None] - torch.stack((x, y))
            z = torch.cat((features[i], relative))[None]
            parts = parameters[i, j].split(counts + biases)
            for layer, (inputs, outputs) in enumerate([(c + 2, 8), (8, 8), (8, 1)]):
                z = F.conv2d(z, parts[layer].view(outputs, inputs, 1, 1), parts[layer + 3])
                z = z.relu() if layer < 2 else z
            torch.testing.assert_close(got[i, j], z[0, 0], rtol=1e-4, atol=1e-3)


def test_dynamic_mask_head_refuses_a_wrong_parameter_count() -> None:
    with pytest.raises(ValueError, match="expected 169"):
        dynamic_mask_head(torch.randn(1, 8, 2, 2), torch.randn(1, 1, 168), torch.zeros(1, 1, 2))


def test_aligned_bilinear_keeps_a_linear_ramp() -> None:
    ramp = torch.arange(6.0).expand(1, 1, 4, 6)
    enlarged = aligned_bilinear(ramp, 2)
    assert enlarged.shape == (1, 1, 8, 12)
    torch.testing.assert_close(enlarged[0, 0, 0], torch.tensor([0, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]))
