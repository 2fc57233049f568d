"""Affinity and dynamic mask head beyond the golden numbers: definitions, plain forms, memory, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fewref.kernels.affinity import affinity
from fewref.kernels.dynamic_mask import aligned_bilinear, dynamic_mask_head, parameter_counts

FORMS = ("reference", "pytorch")


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize(("channels", "values_channels"), [(16, 16), (16, 10), (8, 24)])
def test_affinity_is_a_softmax_over_the_keys(backend: str, channels: int, values_channels: int) -> None:
    generator = torch.Generator().manual_seed(channels + values_channels)
    shapes = ((2, 30, channels), (2, 12, channels), (2, 12, values_channels))
    given = [(3 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    want = torch.stack(
        [
            torch.stack([(torch.mv(k, pixel) / channels**0.5).softmax(0) @ v for pixel in q])
            for q, k, v in zip(*exact, strict=True)
        ]
    )
    got = affinity(*given, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    incoming = torch.randn(got.shape, generator=generator)
    gradients = torch.autograd.grad(got, given, incoming)
    for mine, true in zip(gradients, torch.autograd.grad(want, exact, incoming.double()), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "holds"), [("pytorch", False), ("reference", True)])
def test_affinity_never_holds_the_matrix(backend: str, holds: bool) -> None:
    """Channel-major tensors seen through a transpose are what the convolutions give; unfused they cost N*M floats."""
    n, m = 4096, 2048
    query, keys, values = (torch.randn(1, 64, size).transpose(1, 2) for size in (n, m, m))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        affinity(query, keys, values, backend=backend)
    largest = max(event.self_cpu_memory_usage for event in run.events())
    assert largest > 0
    assert (largest >= n * m * 4 / 4) == holds


@pytest.mark.parametrize("backend", FORMS)
def test_dynamic_mask_head_is_a_small_network_per_query(backend: str) -> None:
    n, q, c, h, w = 2, 3, 6, 4, 5
    features, references = torch.randn(n, c, h, w), torch.rand(n, q, 2) * 20
    counts, biases = parameter_counts(c, 8, 3)
    parameters = torch.randn(n, q, sum(counts) + sum(biases))
    got = dynamic_mask_head(features, parameters, references, stride=4, backend=backend)
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


def head_memory(backend: str) -> tuple[Tensor, int]:
    """Logits of a head for 6 queries of 64 channels, and the bytes of the largest tensor that it allocates."""
    generator = torch.Generator().manual_seed(0)
    counts = sum(sum(part) for part in parameter_counts(64, 8, 3))
    features, parameters = (
        torch.randn(2, 64, 20, 30, generator=generator),
        torch.randn(2, 6, counts, generator=generator),
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        logits = dynamic_mask_head(features, 0.1 * parameters, torch.ones(2, 6, 2) * 50, backend=backend)
    return logits, max(event.self_cpu_memory_usage for event in run.events())


def test_dynamic_mask_head_never_repeats_the_features() -> None:
    split, little = head_memory("pytorch")
    repeated, much = head_memory("reference")
    torch.testing.assert_close(split, repeated, rtol=1e-4, atol=1e-3)
    copies = 2 * 6 * 64 * 20 * 30 * 4
    assert little < copies / 4
    assert much >= copies


def test_dynamic_mask_head_refuses_a_wrong_parameter_count() -> None:
    with pytest.raises(ValueError, match="expected 169"):
        dynamic_mask_head(torch.randn(1, 8, 2, 2), torch.randn(1, 1, 168), torch.zeros(1, 1, 2))


def test_aligned_bilinear_keeps_a_linear_ramp() -> None:
    ramp = torch.arange(6.0).expand(1, 1, 4, 6)
    enlarged = aligned_bilinear(ramp, 2)
    assert enlarged.shape == (1, 1, 8, 12)
    torch.testing.assert_close(enlarged[0, 0, 0], torch.tensor([0, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]))
