"""The Triton kernels against grid_sample in float64: in Triton's interpreter, on a GPU where there is one, compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")

from fewref.kernels.deformable_triton import backward, forward  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Shapes = list[tuple[int, int]]


def random_case(shapes: Shapes, n: int, q: int, m: int, d: int, points: int, seed: int = 0) -> list[Tensor]:
    """value, locations a little beyond the maps, weights, grad: float32."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(n, sum(h * w for h, w in shapes), m, d, generator=generator)
    locations = torch.rand(n, q, m, len(shapes), points, 2, generator=generator) * 1.6 - 0.3
    weights = torch.randn(n, q, m, len(shapes), points, generator=generator)
    grad = torch.randn(n, q, m * d, generator=generator)
    return [tensor.to(DEVICE) for tensor in (value, locations, weights, grad)]


def truth(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and the gradients of value, locations and weights by one grid_sample per level and autograd, float64."""
    value, locations, weights = (t.double().cpu().requires_grad_() for t in (value, locations, weights))
    n, _, m, d = value.shape
    total = torch.zeros(n, locations.shape[1], m, d, dtype=torch.float64)
    start = 0
    for level, (h, w) in enumerate(shapes):
        if h * w == 0:
            continue
        plane = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(n * m, d, h, w)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(plane, grid, align_corners=False).view(n, m, d, -1, locations.shape[4])
        total = total + torch.einsum("nmdqp,nqmp->nqmd", samples, weights[:, :, :, level])
        start += h * w
    output = total.flatten(2)
    inputs = (value, locations, weights)
    grads = torch.autograd.grad(output, inputs, grad.double().cpu(), allow_unused=True, materialize_grads=True)
    return [output.detach(), *grads]


def results(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    return [forward(value, shapes, locations, weights), *backward(grad, value, shapes, locations, weights)]


def check(got: list[Tensor], want: list[Tensor], tolerance: float = 2e-5) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=tolerance, atol=tolerance)


def random_shapes(seed: int) -> tuple:
    """Arguments of `random_case`: up to four levels, some empty, and any numbers of heads, channels and points."""
    rng = np.random.default_rng(seed)
    shapes = [(int(h), int(w)) for h, w in rng.integers(0, 8, (rng.integers(1, 5), 2))]
    return shapes, *(int(number) for number in rng.integers(1, (3, 20, 4, 14, 4)))


CASES = {
    "levels": ([(5, 7), (3, 4), (2, 2), (1, 1), (1, 3)], 1, 3, 2, 4, 1),
    "one map": ([(6, 9)], 2, 17, 1, 8, 3),
    "head of 20": ([(4, 5), (2, 3)], 1, 5, 3, 20, 2),
    "head of 1": ([(4, 5), (2, 3)], 1, 5, 2, 1, 2),
    "many points": ([(3, 8)], 1, 2, 1, 5, 8),
    "lines": ([(1, 9), (9, 1), (1, 1)], 1, 4, 2, 3, 2),
    "two gather blocks": ([(7, 11)], 1, 35, 1, 4, 1),
    **{f"random {seed}": random_shapes(seed) for seed in range(4)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_is_grid_sample_with_its_gradients(name: str, deterministic: bool, request: pytest.FixtureRequest) -> None:
    if deterministic:
        request.getfixturevalue("fixed_order")
    shapes = CASES[name][0]
    value, locations, weights, grad = random_case(*CASES[name], seed=list(CASES).index(name))
    check(results(value, shapes, locations, weights, grad), truth(value, shapes, locations, weights, grad))


@pytest.fixture
def fixed_order():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_half_types_are_rounded_once(dtype: torch.dtype, deterministic: bool, request: pytest.FixtureRequest) -> None:
    if deterministic:
        request.getfixturevalue("fixed_order")
    shapes = [(4, 6), (2, 3)]
    value, locations, weights, grad = random_case(shapes, 1, 20, 2, 6, 2)
    value, grad = value.to(dtype), grad.to(dtype)
    got, want = results(value, shapes, locations, weights, grad), truth(value, shapes, locations, weights, grad)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32]
    # Triton's interpreter cuts bfloat16 off, by up to a unit in the last place; the compiler rounds to half a unit.
    unit = torch.finfo(dtype).eps
    check(got[:1], want[:1], tolerance=unit * (1 if DEVICE == "cpu" else 0.5) + 2e-5)
    check(got[1:2], want[1:2], tolerance=unit / 2 + 2e-5)
    check(got[2:], want[2:])


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_outside_gives_nothing(deterministic: bool, request: pytest.FixtureRequest) -> None:
    """Far points, infinite ones and NaN: each sample is replaced by one far off the map for the truth."""
    if deterministic:
        request.getfixturevalue("fixed_order")
    shapes = [(4, 6), (2, 3)]
    value, locations, weights, grad = random_case(shapes, 1, 9, 2, 4, 2)
    far = [1e9, -1e9, 3e38, torch.inf, -torch.inf, torch.nan, 2.0**31, -(2.0**32)]
    tame = locations.clone()
    for index, number in enumerate(far):
        locations[0, index, :, 0, 0, index % 2] = number
        tame[0, index, :, 0, 0] = -7
    got = results(value, shapes, locations, weights, grad)
    check(got, truth(value, shapes, tame, weights, grad))
    assert not got[2][0, : len(far), :, 0, 0].any()


def test_empty_levels_queries_and_items() -> None:
    shapes = [(0, 5), (3, 4), (4, 0), (0, 0)]
    value, locations, weights, grad = random_case(shapes, 2, 4, 2, 3, 2)
    check(results(value, shapes, locations, weights, grad), truth(value, shapes, locations, weights, grad))
    for n, q, shapes in ((2, 0, [(2, 3)]), (0, 3, [(2, 3)]), (1, 3, [(0, 0)]), (1, 3, [])):
        case = random_case(shapes, n, q, 2, 3, 2)
        value, locations, weights, grad = case
        got = results(value, shapes, locations, weights, grad)
        assert [t.shape for t in got] == [grad.shape, value.shape, locations.shape, weights.shape]
        assert not any(t.any() for t in got)


def test_views_are_read_where_they_lie() -> None:
    """Expanded over heads, transposed, sliced: strides say where values are, and gradients stay per head."""
    shapes = [(3, 5), (2, 2)]
    value, locations, weights, grad = random_case(shapes, 2, 4, 3, 4, 2)
    strided = {
        "heads": value[:, :, :1].expand(-1, -1, 3, -1),
        "items": value[:1].expand(2, -1, -1, -1),
        "channels first": value.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        "every second": torch.stack((value, value * 9), -1).flatten(3)[..., ::2],
    }
    sliced = torch.stack((locations, locations))[1], torch.stack((weights, weights), -1)[..., 1]
    for view in strided.values():
        got = results(view, shapes, *sliced, grad.transpose(1, 2).contiguous().transpose(1, 2))
        check(got, truth(view, shapes, locations, weights, grad))


def test_a_point_on_the_border_takes_the_right_derivative() -> None:
    """At a whole coordinate the two sides differ; sizes are powers of two, so that float32 is exact."""
    shapes = [(4, 4)]
    value, locations, weights, grad = random_case(shapes, 1, 6, 1, 2, 1)
    locations[0, :, 0, 0, 0, 0] = torch.tensor([0.125, 0.375, 0.625, 0.875, 1.0, 0.0])
    check(results(value, shapes, locations, weights, grad), truth(value, shapes, locations, weights, grad))


def test_fixed_order_repeats_to_the_bit(fixed_order) -> None:
    """Many queries on few pixels, twice; on a GPU atomics would differ here."""
    shapes = [(2, 2)]
    value, locations, weights, grad = random_case(shapes, 1, 2000 if DEVICE == "cuda" else 40, 1, 4, 2)
    first, second = (backward(grad, value, shapes, locations, weights)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_refuses_types_that_it_would_round() -> None:
    value, locations, weights, _ = random_case([(2, 2)], 1, 1, 1, 1, 1)
    with pytest.raises(TypeError, match="values are torch.float64"):
        forward(value.double(), [(2, 2)], locations, weights)
    with pytest.raises(TypeError, match="locations torch.bfloat16"):
        forward(value, [(2, 2)], locations.bfloat16(), weights)


def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Every kernel through Triton's compiler and ptxas for sm_80 and sm_90, without spilling registers."""
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no NVIDIA back end")
    if not list((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")):
        pytest.skip("this Triton comes without ptxas")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("compile_triton.py"), "80", "90"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert {line["kernel"] for line in lines} > {"backward, no atomics", "gather", "forward, odd", "backward, odd"}
    wanted = {(kernel, dtype) for kernel in ("forward", "backward") for dtype in ("fp32", "bf16", "fp16")}
    for capability in (80, 90):
        made = [line for line in lines if line["capability"] == capability]
        assert wanted <= {(line["kernel"], line["type"]) for line in made}
        assert all(line["bytes"] and not line["spilled"] for line in made), made


def test_import_fails_cleanly_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "try: import fewref.kernels.deformable_triton\n"
        "except ImportError: print('ok')"
    )
    safe = "-P" if sys.version_info >= (3, 11) else "-I"
    run = subprocess.run([sys.executable, safe, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "ok", run.stderr
