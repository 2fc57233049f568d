"""Deformable attention on every backend: the definition in float64 over random shapes, views, threads, compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewref.kernels import deformable_attention, deformable_reference
from fewref.kernels.deformable_attention import ms_deform_attn
from fewref.kernels.deformable_reference import sample_by_bags, sample_by_grid
from fewref.kernels.dispatch import ENVIRONMENT, differentiable_twice, import_problem, using

Shapes = list[tuple[int, int]]
SHAPES = [(5, 7), (3, 4), (1, 2)]
NO_NUMBA = import_problem("numba")
NO_TRITON = import_problem("triton")
needs_numba = pytest.mark.skipif(bool(NO_NUMBA), reason=NO_NUMBA or "numba is there")
BACKENDS = ["reference", "bags", pytest.param("numba", marks=needs_numba)]


@dataclass(frozen=True)
class Sizes:
    """Letters as in `ms_deform_attn`; planes: 1 where all heads share one; spread: reach of the locations."""

    shapes: Shapes
    n: int
    q: int
    m: int
    p: int
    d: int
    planes: int | None = None
    spread: float = 1.6


RANDOM = [
    Sizes([(5, 7), (3, 4)], 2, 6, 4, 2, 8),
    Sizes([(9, 4), (4, 2), (2, 1), (1, 1)], 1, 40, 2, 4, 32),  # enough samples to pack the planes
    Sizes([(3, 5)], 3, 7, 1, 1, 1),
    Sizes([(6, 1), (1, 6), (1, 1)], 1, 5, 3, 3, 20),
    Sizes([(0, 4), (4, 4), (2, 0), (0, 0)], 2, 9, 2, 2, 12),
    Sizes([(4, 3), (2, 2)], 1, 11, 5, 2, 33),
    Sizes([(4, 6), (2, 3)], 2, 3, 8, 4, 96, planes=1),
    Sizes([(4, 6), (2, 3)], 2, 17, 4, 4, 16, planes=1),
    Sizes([(2, 3)], 1, 8, 2, 2, 4, spread=60.0),
    Sizes([(2, 3)], 2, 0, 2, 2, 4),
]


def draw(sizes: Sizes, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """value, locations, weights and a gradient of the result; no location within 1e-3 pixels of a kink."""
    generator = torch.Generator().manual_seed(seed)
    s, levels = sum(h * w for h, w in sizes.shapes), len(sizes.shapes)
    value = torch.randn(sizes.n, s, sizes.planes or sizes.m, sizes.d, generator=generator).to(dtype)
    samples = (sizes.n, sizes.q, sizes.m, levels, sizes.p)
    locations = (torch.rand(*samples, 2, generator=generator) - 0.5) * sizes.spread + 0.5
    extents = torch.tensor([(max(w, 1), max(h, 1)) for h, w in sizes.shapes])[:, None]
    pixels = locations * extents - 0.5
    locations = torch.where((pixels - pixels.round()).abs() < 1e-3, locations + 0.01 / extents, locations)
    weights = torch.randn(samples, generator=generator)
    grad = torch.randn(sizes.n, sizes.q, sizes.m * sizes.d, generator=generator).to(dtype)
    return value, locations, weights, grad


def by_definition(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The value of every pixel times the product of two hat functions, in float64, in one product per level."""
    value = value.double().expand(-1, -1, locations.shape[2], -1)
    total, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        x = locations[:, :, :, level, :, 0].double() * w - 0.5  # (N,Q,M,P)
        y = locations[:, :, :, level, :, 1].double() * h - 0.5
        across = (1 - (x[..., None] - torch.arange(w)).abs()).clamp(min=0)  # (N,Q,M,P,w)
        down = (1 - (y[..., None] - torch.arange(h)).abs()).clamp(min=0)
        plane = value[:, start : start + h * w].unflatten(1, (h, w))
        share = weights[:, :, :, level].double()
        total = total + torch.einsum("nqmp,nqmpy,nqmpx,nyxmd->nqmd", share, down, across, plane)
        start += h * w
    return total.flatten(2)


def sample(backend: str, *arguments: object) -> Tensor:
    """`ms_deform_attn` on a backend; "bags" is the form of "pytorch" that some sizes take."""
    if backend != "bags":
        return ms_deform_attn(*arguments, backend=backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deformable_attention, "suits_bags", lambda *_: True)
        return ms_deform_attn(*arguments, backend="pytorch")


def with_gradients(function: object, given: tuple[Tensor, ...], shapes: Shapes, grad: Tensor) -> list[Tensor]:
    value, locations, weights = (tensor.detach().requires_grad_() for tensor in given)
    output = function(value, shapes, locations, weights)
    return [output.detach(), *torch.autograd.grad(output, (value, locations, weights), grad.to(output.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(RANDOM)))
def test_it_is_its_definition(backend: str, number: int) -> None:
    sizes = RANDOM[number]
    *given, grad = draw(sizes, number)
    want = with_gradients(by_definition, tuple(given), sizes.shapes, grad)
    got = with_gradients(lambda *args: sample(backend, *args), tuple(given), sizes.shapes, grad)
    for mine, true, scale in zip(got, want, (1, 1, 10, 1), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true.double(), rtol=2e-5, atol=2e-5 * scale)


@pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON or "Triton is there")
@pytest.mark.parametrize("planes", [None, 1])
def test_triton_is_its_definition_through_the_operator(planes: int | None) -> None:
    """A shared plane too, which the kernel itself does not know; where there is no GPU, in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = Sizes([(4, 6), (2, 3)], 1, 5, 2, 2, 8, planes=planes)
    *given, grad = draw(sizes, 17)
    want = with_gradients(by_definition, tuple(given), sizes.shapes, grad)
    moved = tuple(tensor.to(device) for tensor in given)
    got = with_gradients(lambda *args: sample("triton", *args), moved, sizes.shapes, grad.to(device))
    for mine, true in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu().double(), true.double(), rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_types_round_once_at_the_end(backend: str, dtype: torch.dtype, rounding: float) -> None:
    for sizes in (RANDOM[1], RANDOM[6]):
        *given, grad = draw(sizes, 3, dtype)
        wide = [given[0].float(), *given[1:]]
        want = with_gradients(by_definition, tuple(wide), sizes.shapes, grad.float())
        with torch.autocast("cpu", torch.bfloat16):
            got = with_gradients(lambda *args: sample(backend, *args), tuple(given), sizes.shapes, grad)
        assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32, torch.float32]
        for mine, true in zip(got, want, strict=True):
            unit = rounding if mine.dtype == dtype else 2e-5
            torch.testing.assert_close(mine.double(), true.double(), rtol=1.01 * unit, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_points_are_outside(backend: str) -> None:
    value, locations, weights, _ = draw(Sizes(SHAPES, 2, 6, 4, 2, 8), 4)
    grad = torch.ones(2, 6, 32)
    outside = [3e9, -3e9, 1e30]
    if backend == "numba":  # of these PyTorch's grid_sample makes NaN
        outside += [float("inf"), float("-inf"), float("nan")]
    for far in outside:
        for axes in ([0], [1], [0, 1]):
            moved = locations.clone()
            moved[..., axes] = far
            got = with_gradients(lambda *a: sample(backend, *a), (value, moved, weights), SHAPES, grad)
            assert not any(tensor.any() for tensor in got), far


@needs_numba
def test_one_nan_location_spoils_no_other() -> None:
    value, locations, weights, _ = draw(Sizes(SHAPES, 1, 6, 4, 2, 8), 5)
    moved, without = locations.clone(), weights.clone()
    moved[0, 2, 1, 0, 1, 0] = float("nan")
    without[0, 2, 1, 0, 1] = 0
    torch.testing.assert_close(
        ms_deform_attn(value, SHAPES, moved, weights, "numba"),
        ms_deform_attn(value, SHAPES, locations, without, "numba"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [5, 60])
def test_views_of_values_are_as_good_as_copies(backend: str, queries: int) -> None:
    """Expanded over heads, transposed, and cut out of something larger."""
    sizes = Sizes(SHAPES, 2, queries, 4, 2, 8)
    value, locations, weights, grad = draw(sizes, 6)
    views = {
        "expanded": value[:, :, :1].expand(-1, -1, 4, -1),
        "transposed": value.transpose(1, 2).contiguous().transpose(1, 2),
        "channels first": value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "cut": torch.randn(2, 60, 6, 12)[:, 5:54, 1:5, 2:10],
    }
    for name, view in views.items():
        args = (locations, weights)
        plain = with_gradients(lambda *a: sample(backend, *a), (view.contiguous(), *args), SHAPES, grad)
        got = with_gradients(lambda *a: sample(backend, *a), (view, *args), SHAPES, grad)
        for mine, true in zip(got, plain, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@needs_numba
def test_an_expanded_value_is_never_copied_per_head() -> None:
    memory = torch.randn(1, 3000, 1, 64)
    _, locations, weights, _ = draw(Sizes([(50, 60)], 1, 5, 8, 2, 64), 7)
    from fewref.kernels import deformable_numba

    call = deformable_numba._Call(memory.expand(-1, -1, 8, -1), [(50, 60)], locations, weights)
    assert call.arguments[0].ctypes.data == memory.data_ptr()
    assert not call.packed


@needs_numba
def test_more_positions_than_float32_counts_are_refused_in_one_line() -> None:
    value = torch.zeros(1).expand(1, 2**24 + 1, 1, 1)
    with pytest.raises(ValueError, match="16777217 positions are more than .* backend='pytorch'"):
        ms_deform_attn(value, [(1, 2**24 + 1)], torch.ones(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1), "numba")


@needs_numba
@pytest.mark.parametrize("planes", [None, 1])
def test_threads_change_no_bit(planes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewref.kernels import deformable_numba

    monkeypatch.setattr(deformable_numba, "_WORTH_THREADS", 0)
    sizes = Sizes([(9, 4), (4, 2)], 5, 40, 4, 4, 8, planes=planes)
    *given, grad = draw(sizes, 8)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                with_gradients(lambda *a: sample("numba", *a), tuple(given), sizes.shapes, grad),
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize("form", [sample_by_bags, sample_by_grid])
def test_gradients_in_float64(form: object) -> None:
    *given, _ = draw(Sizes(SHAPES, 1, 1, 4, 2, 4), 9)
    given = [tensor.double().requires_grad_() for tensor in given]
    torch.autograd.gradcheck(lambda v, places, shares: form(v, SHAPES, places, shares), given)


def test_float64_and_two_derivatives_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    used = []
    monkeypatch.setattr(deformable_attention, "sample_by_grid", lambda *a: used.append("grid") or sample_by_grid(*a))
    *given, _ = draw(Sizes(SHAPES, 1, 5, 2, 2, 32), 10)
    value, locations, weights = given
    ms_deform_attn(value.double(), SHAPES, locations.double(), weights.double())
    with differentiable_twice():
        ms_deform_attn(value, SHAPES, locations, weights)
    assert used == ["grid", "grid"]


@pytest.mark.parametrize(("channels", "queries", "wanted"), [(32, 90, "bags"), (8, 90, "grid"), (8, 5, "bags")])
def test_pytorch_picks_the_form_by_size(
    channels: int, queries: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    for name, form in (("bags", sample_by_bags), ("grid", sample_by_grid)):
        spy = lambda *args, name=name, form=form: used.append(name) or form(*args)  # noqa: E731
        monkeypatch.setattr(deformable_attention, f"sample_by_{name}", spy)
    value, locations, weights, _ = draw(Sizes(SHAPES, 1, queries, 2, 2, channels), 11)
    ms_deform_attn(value, SHAPES, locations, weights, backend="pytorch")
    assert used == [wanted]


def test_chunks_of_bags_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    value, locations, weights, _ = draw(Sizes(SHAPES, 5, 6, 4, 2, 8), 12)
    whole = sample_by_bags(value, SHAPES, locations, weights)
    monkeypatch.setattr(deformable_reference, "_CHUNK", 2 * 6 * 4 * 24)
    assert torch.equal(sample_by_bags(value, SHAPES, locations, weights), whole)


@pytest.mark.parametrize("backend", ["pytorch", pytest.param("numba", marks=needs_numba)])
def test_it_compiles_into_one_graph_with_the_same_numbers(backend: str) -> None:
    *given, grad = draw(RANDOM[1], 13)
    shapes = RANDOM[1].shapes

    def layer(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(2 * value, shapes, locations, weights.softmax(-1)).sin()

    with using(backend):
        want = with_gradients(layer, tuple(given), shapes, grad)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        got = with_gradients(compiled, tuple(given), shapes, grad)
    for mine, true in zip(got, want, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_custom_op_keeps_its_contract(dtype: torch.dtype) -> None:
    value, locations, weights, grad = draw(Sizes(SHAPES, 1, 3, 2, 2, 4), 14, dtype)
    sizes = [size for shape in SHAPES for size in shape]
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(torch.ops.fewref.ms_deform_attn, (leaves[0], sizes, *leaves[1:], "numba"))
    inner = (grad, value.detach(), sizes, locations.detach(), weights.detach(), "numba")
    torch.library.opcheck(torch.ops.fewref.ms_deform_attn_backward, inner)


@needs_numba
def test_a_second_derivative_of_a_compiled_kernel_is_refused() -> None:
    *given, _ = draw(Sizes(SHAPES, 1, 3, 2, 2, 4), 15)
    value, locations, weights = (tensor.requires_grad_() for tensor in given)
    output = ms_deform_attn(value, SHAPES, locations, weights, backend="numba")
    (once,) = torch.autograd.grad(output.sum(), locations, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(once.sum(), value)


@needs_numba
def test_the_next_process_finds_the_code_on_disk(tmp_path) -> None:
    script = (
        "import torch; from fewref.kernels import deformable_numba as module\n"
        "given = torch.ones(1, 6, 1, 4), [(2, 3)], torch.ones(1, 2, 1, 1, 1, 2), torch.ones(1, 2, 1, 1, 1)\n"
        "module.forward(*given)\n"
        "print(sum(module.kernels(4)[0].stats.cache_hits.values()))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert outputs == ["0", "1"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v, s, x, w: (v[:, 1:], s, x, w), "do not add up to 48 positions"),
        (lambda v, s, x, w: (v, [*s, (0, 0)], x, w), "items, heads or levels"),
        (lambda v, s, x, w: (v[:, :, :3], s, x, w), "items, heads or levels"),
        (lambda v, s, x, w: (v[:1], s, x, w), "items, heads or levels"),
        (lambda v, s, x, w: (v, s, x, w[:, 1:]), "do not fit locations"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: object, told: str) -> None:
    value, locations, weights, _ = draw(Sizes(SHAPES, 2, 6, 4, 2, 8), 16)
    with pytest.raises(ValueError, match=told):
        ms_deform_attn(*change(value, SHAPES, locations, weights))
