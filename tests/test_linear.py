"""Linear layers and affinity through oneDNN, which only runs without gradients: against PyTorch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fewref.kernels.affinity import ROWS, affinity
from fewref.kernels.linear import WORTH, linear, onednn_pays

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def calls(function) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    return {event.key for event in recorded.key_averages()}


@pytest.mark.parametrize(("shape", "outputs"), [((700, 60), 53), ((2, 5, 70, 60), 64), ((1, 3000, 17), 44)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_linear_is_exact_within_rounding(shape: tuple, outputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(outputs, shape[-1], generator=generator)
    added = torch.randn(outputs, generator=generator) if bias else None
    assert x.numel() * outputs >= WORTH
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        got = linear(given, weight, added)
        exact = F.linear(given.double(), weight.double(), added if added is None else added.double())
        assert got.shape == (*shape[:-1], outputs)
        assert got.is_contiguous() or given is not x
        torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-4)
    assert "aten::mkldnn_convolution" in calls(lambda: linear(x, weight, added))


def test_linear_takes_pytorchs_own_form_where_the_detour_does_not_serve() -> None:
    x, weight = torch.randn(700, 60), torch.randn(53, 60)
    cases = {"gradients": x, "float64": x.double(), "few": x[:5]}
    with torch.no_grad():
        small = calls(lambda: linear(cases["few"], weight))
        wide = calls(lambda: linear(cases["float64"], weight.double()))
        plain = calls(lambda: linear(x, weight, backend="reference"))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
    for called in (small, wide, plain, calls(lambda: linear(cases["gradients"], weight))):
        assert "aten::linear" in called
    assert linear(x.requires_grad_(), weight).requires_grad
    assert not onednn_pays(x)


@pytest.mark.parametrize("sizes", [(2, ROWS * 2 + 30, 700, 32, 20), (1, 40, 90, 128, 128)])
@torch.no_grad()
def test_affinity_by_rows_is_the_naive_one(sizes: tuple) -> None:
    batch, n, m, channels, outputs = sizes
    generator = torch.Generator().manual_seed(1)
    query = 3 * torch.randn(batch, n, channels, generator=generator)
    keys = 3 * torch.randn(batch, m, channels, generator=generator)
    values = torch.randn(batch, m, outputs, generator=generator)
    exact = affinity(query.double(), keys.double(), values.double(), backend="reference")
    torch.testing.assert_close(affinity(query, keys, values), exact.float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_affinity_by_rows_holds_few_rows() -> None:
    query, keys = torch.randn(1, 20 * ROWS, 16), torch.randn(1, 500, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        affinity(query, keys, keys)
    largest = max(event.cpu_memory_usage for event in recorded.events() if event.cpu_memory_usage > 0)
    assert largest < 4 * query.shape[1] * keys.shape[1] / 8
