"""How fast each operator is on each of its backends, all in one process, beside the floor that memory and sums set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fewref.benchmark.speed_machine import forget_peak, machine_line, peak_bytes
from fewref.kernels.affinity import affinity
from fewref.kernels.deformable_attention import Shapes, ms_deform_attn
from fewref.kernels.dispatch import BACKENDS, choose
from fewref.kernels.dynamic_mask import dynamic_mask_head, parameter_counts
from fewref.kernels.linear import linear

# One core of the machine of kernels specification 5, as measured there: bytes and operations per second.
CORE_BYTES, CORE_FLOP = 8.6e9, 96e9
# Share of numbers in which backends agree; gradients of locations jump where rounding moves a point to another pixel.
AGREEING = 0.9999
WORTH_TIMING = 0.05  # seconds; shorter calls are timed several at once
FORWARD, BOTH = "forward", "forward + backward"
PAPER_MAPS = ((45, 80), (23, 40), (12, 20), (6, 10))  # 360x640 pixels at strides 8 to 64
SMALL_MAPS = ((23, 40), (12, 20), (6, 10), (3, 5))
TINY_MAPS = ((4, 6), (2, 3))


@dataclass(frozen=True)
class Case:
    """An operator at one size.

    tensors: what it is given, gradients going to all; call: tensors, backend -> result; bytes_, flop: what forward
    alone, and forward with backward, cannot do without, all of it float32 and read or written once.
    """

    op: str
    size: str
    tensors: tuple[Tensor, ...]
    call: Callable[[tuple[Tensor, ...], str], Tensor]
    bytes_: dict[str, float]
    flop: dict[str, float]

    def floor(self, what: str) -> float:
        """Seconds on one core of the specification's machine."""
        return max(self.bytes_[what] / CORE_BYTES, self.flop[what] / CORE_FLOP)


def kernels_table(repeats: int = 3, quick: bool = False, seed: int = 0) -> str:
    """Time every operator on every backend and return Markdown: a table for the CPU, and one for CUDA where it is.

    repeats: rounds, in which the backends take turns and whose median counts; quick: tiny sizes, for tests. The floors
    are those of one core, see `CORE_BYTES`. Raises RuntimeError where a backend's numbers are not those of "reference".
    """
    parts = [_device_table("cpu", repeats, quick, seed)]
    parts += [
        f"Median of {repeats} rounds in which the backends take turns, compiled before; float32; how many times "
        "faster than `reference` in parentheses. Floor: what memory and arithmetic allow one core of the machine in "
        "the kernels specification (8.6 GB/s, 96 GFLOP/s), not of this one. Extra memory: how far one call, its "
        "result included, raises the resident set, in the order of the columns. J and F are in `speed scoring`."
    ]
    if torch.cuda.is_available():
        parts += [_device_table("cuda", repeats, quick, seed)]
        parts += [f"GB/s: the bytes that an operator cannot do without, per second; a copy reaches {_copy_rate():.0f}."]
    return "\n\n".join([*parts, machine_line()])


def _device_table(device: str, repeats: int, quick: bool, seed: int) -> str:
    offered = [name for name in BACKENDS if name != ("triton" if device == "cpu" else "numba")]
    lines = [f"| operator, {device} | size | pass | {' | '.join(offered)} | floor, ms | extra memory, MB |"]
    lines += ["|---|---|---|" + "---:|" * (len(offered) + 2)]
    generator = torch.Generator().manual_seed(seed)
    for make in _cases(quick):
        case = make(generator, device)
        backends = [name for name in offered if _has(case.op, device, name)]
        for what in case.bytes_:
            seconds, extra = _race(case, what, backends, repeats)
            cells = [case.op.replace("_", " "), case.size, what]
            cells += [_cell(case, what, name, seconds, device) for name in offered]
            memory = [f"{extra[name] / 1e6:.0f}" for name in backends]
            floor = f"{1e3 * case.floor(what):.3g}" if device == "cpu" else "-"
            lines.append("| " + " | ".join([*cells, floor, " / ".join(memory)]) + " |")
    return "\n".join(lines)


def _has(op: str, device: str, backend: str) -> bool:
    """Whether an operator has a form in a backend that runs here."""
    try:
        return choose(op, device, torch.float32, backend) == backend
    except ValueError:
        return False


def _cell(case: Case, what: str, backend: str, seconds: dict[str, float], device: str) -> str:
    if backend not in seconds:
        return ""
    told = [] if backend == "reference" else [f"{seconds['reference'] / seconds[backend]:.1f}x"]
    told += [f"{case.bytes_[what] / seconds[backend] / 1e9:.0f} GB/s"] if device == "cuda" else []
    return f"{1e3 * seconds[backend]:.3g} ms" + (f" ({', '.join(told)})" if told else "")


def _race(case: Case, what: str, backends: Sequence[str], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and extra bytes of each backend; RuntimeError where one's numbers differ from the first one's."""
    device, first = case.tensors[0].device, None
    for name in backends:
        results = _work(case, what, name)  # compiles, too
        first = results if first is None else first
        for mine, true in zip(results, first, strict=True):
            close = torch.isclose(mine, true, rtol=1e-3, atol=1e-4 * true.abs().max().item())
            if close.float().mean() < AGREEING:
                raise RuntimeError(f"{case.op}: {name} differs from {backends[0]}; its speed means nothing")
        del results
    del first
    times: dict[str, list[float]] = {name: [] for name in backends}
    extra: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(repeats):
        for name in backends:
            seconds, more = _measured(lambda name=name: _work(case, what, name), device)
            times[name].append(seconds)
            extra[name].append(more)
    most = {name: max(grown) for name, grown in extra.items()}
    return {name: median(taken) for name, taken in times.items()}, most


def _work(case: Case, what: str, backend: str) -> list[Tensor]:
    if what == FORWARD:
        with torch.inference_mode():
            return [case.call(case.tensors, backend)]
    leaves = tuple(tensor.detach().requires_grad_() for tensor in case.tensors)
    output = case.call(leaves, backend)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def _measured(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of a call, the mean of several where it is short, and by how much it raises memory, see `_memory`."""
    before = _memory(device, forget=True)
    seconds = _seconds(call, device, 1)
    highest = _memory(device)
    if seconds < WORTH_TIMING:
        seconds = _seconds(call, device, min(100, int(WORTH_TIMING / seconds) + 1))
    return seconds, max(0, highest - before)


def _seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Mean of some calls: wall time, and on CUDA the device's own time."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def _memory(device: torch.device, forget: bool = False) -> int:
    """The most bytes held since the last call with `forget`, which gives those held now."""
    if device.type != "cuda":
        return forget_peak() if forget else peak_bytes()
    if not forget:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _copy_rate() -> float:
    """GB/s, read and written, of a large copy on the GPU."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), source.device, 10) / 1e9


def _cases(quick: bool) -> list[Callable[[torch.Generator, str], Case]]:
    """Makers, so that only one case's tensors are held at a time."""
    if quick:
        sizes = [lambda g, d: sampling("encoder", TINY_MAPS, 2, None, g, d)]
        sizes += [lambda g, d: sampling("decoder", TINY_MAPS, 2, 3, g, d)]
        sizes += [lambda g, d: attention("tiny", 2, 24, 32, g, d), lambda g, d: masks("tiny", 2, 2, 8, 6, 9, g, d)]
        return [*sizes, lambda g, d: layer("tiny", 40, 16, 32, g, d)]
    return [
        lambda g, d: sampling("encoder, 10 frames of 360x640", PAPER_MAPS, 10, None, g, d),
        lambda g, d: sampling("decoder, 10 frames, 5 queries", PAPER_MAPS, 10, 5, g, d),
        lambda g, d: sampling("encoder, 5 frames of 180x320", SMALL_MAPS, 5, None, g, d),
        lambda g, d: sampling("decoder, 1 frame, 5 queries", PAPER_MAPS, 1, 5, g, d),
        lambda g, d: attention("stride 8, 10 frames of 360x640", 10, 3600, 128, g, d),
        lambda g, d: attention("stride 16, 10 frames", 10, 920, 128, g, d),
        lambda g, d: attention("stride 32, 10 frames", 10, 240, 128, g, d),
        lambda g, d: masks("10 frames of 360x640, 5 queries", 10, 5, 256, 90, 160, g, d),
        lambda g, d: masks("5 frames of 180x320", 5, 5, 256, 45, 80, g, d),
        lambda g, d: masks("8 channels (SOC), 1 frame", 1, 20, 8, 90, 160, g, d),
        lambda g, d: layer("encoder values, 48200 x 256 x 256", 48200, 256, 256, g, d),
        lambda g, d: layer("encoder FFN, 48200 x 256 x 2048", 48200, 256, 2048, g, d),
        lambda g, d: layer("one frame, 4820 x 256 x 256", 4820, 256, 256, g, d),
        lambda g, d: layer("decoder, 50 x 256 x 256", 50, 256, 256, g, d),
    ]


def sampling(size: str, shapes: Shapes, n: int, queries: int | None, generator: torch.Generator, device: str) -> Case:
    """Deformable attention of 8 heads of 32 channels and 4 points; without queries every position asks near itself."""
    m, p, d, levels, s = 8, 4, 32, len(shapes), sum(h * w for h, w in shapes)
    q = queries or s
    extents = torch.tensor([(w, h) for h, w in shapes])
    if queries:
        centres = torch.rand(n, q, 2, generator=generator)
    else:
        grids = [torch.cartesian_prod(torch.arange(h) + 0.5, torch.arange(w) + 0.5).flip(1) for h, w in shapes]
        centres = torch.cat([grid / extent for grid, extent in zip(grids, extents, strict=True)]).expand(n, -1, -1)
    offsets = 2 * torch.randn(n, q, m, levels, p, 2, generator=generator)  # pixels
    locations = centres[:, :, None, None, None] + offsets / extents[:, None]
    weights = torch.rand(n, q, m, levels * p, generator=generator).softmax(-1).view(n, q, m, levels, p)
    value = torch.randn(n, s, m, d, generator=generator)
    samples, outputs = n * q * m * levels * p, n * q * m * d
    touched = min(value.numel(), 4 * samples * d)  # few queries see few pixels
    forward = 4 * (touched + 3 * samples + outputs)
    backward = 4 * (touched + 2 * value.numel() + 6 * samples + outputs)  # the dense gradient is zeroed and written
    return Case(
        "deformable_attention", size, tuple(tensor.to(device) for tensor in (value, locations, weights)),
        lambda given, backend: ms_deform_attn(given[0], shapes, *given[1:], backend=backend),
        {FORWARD: forward, BOTH: forward + backward}, {FORWARD: 8 * samples * d, BOTH: 24 * samples * d},
    )  # fmt: skip


def attention(size: str, frames: int, cells: int, c: int, generator: torch.Generator, device: str) -> Case:
    """CMA's affinity of `frames` maps of `cells` to one of them."""
    tensors = tuple(torch.randn(1, count, c, generator=generator) for count in (frames * cells, cells, cells))
    touched, products = 4 * (2 * frames * cells + 2 * cells) * c, 4 * frames * cells * cells * c
    return Case(
        "affinity", size, tuple(tensor.to(device) for tensor in tensors),
        lambda given, backend: affinity(*given, backend=backend),
        {FORWARD: touched, BOTH: 3 * touched}, {FORWARD: products, BOTH: 3 * products},
    )  # fmt: skip


def masks(size: str, n: int, q: int, c: int, h: int, w: int, generator: torch.Generator, device: str) -> Case:
    """The dynamic mask head with three layers of 8 and coordinates."""
    count = sum(map(sum, parameter_counts(c, 8, 3)))
    features = torch.randn(n, c, h, w, generator=generator)
    parameters = torch.randn(n, q, count, generator=generator) / math.sqrt(c)
    references = torch.rand(n, q, 2, generator=generator) * 4 * h
    touched, products = 4 * (features.numel() + n * q * h * w), 2 * n * q * h * w * (8 * (c + 2) + 64 + 8)
    return Case(
        "dynamic_mask", size, tuple(tensor.to(device) for tensor in (features, parameters, references)),
        lambda given, backend: dynamic_mask_head(*given, backend=backend),
        {FORWARD: touched, BOTH: 3 * touched}, {FORWARD: products, BOTH: 3 * products},
    )  # fmt: skip


def layer(size: str, rows: int, inputs: int, outputs: int, generator: torch.Generator, device: str) -> Case:
    """A fully connected layer; forward alone, as its backends share the backward pass."""
    x, weight = (torch.randn(count, inputs, generator=generator) for count in (rows, outputs))
    bias = torch.randn(outputs, generator=generator)
    touched = 4 * (rows * inputs + outputs * inputs + rows * outputs)
    return Case(
        "linear", size, tuple(tensor.to(device) for tensor in (x, weight, bias)),
        lambda given, backend: linear(*given, backend=backend),
        {FORWARD: touched}, {FORWARD: 2 * rows * inputs * outputs},
    )  # fmt: skip
