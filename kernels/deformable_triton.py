"""Multi-scale deformable attention on a GPU, forward and backward, in Triton; raises ImportError where that is absent.

Operator and closed-form gradients of Deformable DETR (Zhu et al., ICLR 2021), from kernels specification 1.2-1.4 and
6.3. A program owns a few neighbouring queries of one item and head with all their channels, so that the pixels which
they share come from the cache. Values may be float32, bfloat16 or float16; coordinates, weights and sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

Shapes = Sequence[tuple[int, int]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_Q = 16
# The gather of the deterministic gradient works on tiles of pixels x queries.
GATHER_PIXELS, GATHER_QUERIES = 64, 32


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample `value` at `locations` and sum with `weights`, head by head.

    value: (N,S,M,D) of a type in `DTYPES`, any strides; shapes: L pairs (h,w) with S = sum h*w, h*w = 0 allowed;
    locations: float32 (N,Q,M,L,P,2) as (x,y), 0 and 1 the outer edges of a map, outside of which all is zero (NaN is
    outside); weights: float32 (N,Q,M,L,P). Returns (N,Q,M*D) in the type of `value`. Raises TypeError for other types.
    """
    _check_types(value, locations, weights)
    n, _, m, d = value.shape
    _, q, _, levels, points, _ = locations.shape
    output = value.new_empty(n, q, m * d)
    if not output.numel():
        return output
    blocks, block_d, warps = _tiling(q, d, value.element_size())
    with torch.cuda.device_of(value):
        _forward_kernel[(blocks * n * m,)](
            value, _level_table(tuple(map(tuple, shapes)), value.device),
            locations.contiguous(), weights.contiguous(), output,
            blocks, q, m, d, *value.stride(),
            LEVELS=levels, POINTS=points, BLOCK_Q=BLOCK_Q, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return output


def backward(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for grad (N,Q,M*D): of value (N,S,M,D) in its type, of locations and weights in float32.

    The gradient of `value` is added up in float32 by atomics, whose order changes its last bits from run to run. After
    `torch.use_deterministic_algorithms(True)` each pixel collects its share in a fixed order instead, at a cost that
    grows with queries x pixels (an infinite or NaN `grad` then spreads to all pixels of its item and head).
    """
    _check_types(value, locations, weights)
    n, s, m, d = value.shape
    _, q, _, levels, points, _ = locations.shape
    grad, locations, weights = grad.contiguous(), locations.contiguous(), weights.contiguous()
    grad_value = torch.zeros((n, s, m, d), dtype=torch.float32, device=value.device)
    if not grad.numel():
        return grad_value.to(value.dtype), torch.zeros_like(locations), torch.zeros_like(weights)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    blocks, block_d, warps = _tiling(q, d, grad_value.element_size())
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.cuda.device_of(value):
        _backward_kernel[(blocks * n * m,)](
            grad, value, _level_table(tuple(map(tuple, shapes)), value.device), locations, weights,
            grad_value, grad_locations, grad_weights,
            blocks, q, m, d, s, *value.stride(),
            LEVELS=levels, POINTS=points, BLOCK_Q=BLOCK_Q, BLOCK_D=block_d, SCATTER=not deterministic, num_warps=warps,
        )  # fmt: skip
        if deterministic:
            _gather(grad, shapes, locations, weights, grad_value)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _gather(grad: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, grad_value: Tensor) -> None:
    """Write the gradient of the values, float32 (N,S,M,D), in an order of additions that never changes."""
    n, s, m, d = grad_value.shape
    _, q, _, levels, points, _ = locations.shape
    start = 0
    for level, (h, w) in enumerate(shapes):
        blocks = triton.cdiv(h * w, GATHER_PIXELS)
        if blocks:
            _gather_kernel[(blocks * n * m,)](
                grad, locations, weights, grad_value, blocks, q, m, d, s, level, h, w, start,
                LEVELS=levels, POINTS=points, BLOCK_S=GATHER_PIXELS, BLOCK_Q=GATHER_QUERIES,
                BLOCK_D=max(16, triton.next_power_of_2(d)), num_warps=4,
            )  # fmt: skip
        start += h * w


def _check_types(value: Tensor, locations: Tensor, weights: Tensor) -> None:
    if value.dtype not in DTYPES or {locations.dtype, weights.dtype} != {torch.float32}:
        raise TypeError(
            f"values are {value.dtype}, locations {locations.dtype}, weights {weights.dtype}; the Triton kernels take "
            f"values of {', '.join(map(str, DTYPES))} with float32 locations and weights"
        )


def _tiling(queries: int, channels: int, size: int) -> tuple[int, int, int]:
    """Blocks of queries, padded channels, and warps with which a thread's part of a tile is 16 bytes.

    size: bytes per element, of the loads in the forward pass, of the atomics in the backward pass.
    """
    block_d = triton.next_power_of_2(channels)
    warps = BLOCK_Q * block_d * size // (32 * 16)
    return triton.cdiv(queries, BLOCK_Q), block_d, min(max(warps, 1), 8)


@lru_cache(maxsize=256)
def _level_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 (L,3) on the device: height, width and first position; kept, since a copy per call would take longer."""
    rows, start = [], 0
    for h, w in shapes:
        rows.append((h, w, start))
        start += h * w
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 3)


@triton.jit
def _sample_place(locations, place, live, h, w):
    """Left and top pixel, int32, and the fractions beyond them; far off the map where the sample is outside of it.

    The range is tested before the conversion: that of a large float or of NaN to an integer is undefined.
    """
    u = tl.load(locations + 2 * place, mask=live, other=0.0) * w - 0.5
    v = tl.load(locations + 2 * place + 1, mask=live, other=0.0) * h - 0.5
    inside = live & (u > -1) & (u < w) & (v > -1) & (v < h)
    u = tl.where(inside, u, -2.0)
    v = tl.where(inside, v, -2.0)
    left = tl.floor(u)
    top = tl.floor(v)
    return left.to(tl.int32), top.to(tl.int32), u - left, v - top


@triton.jit
def _on_map(x, y, h, w):
    return (x >= 0) & (x < w) & (y >= 0) & (y < h)


@triton.jit
def _load_pixels(base, x, y, h, w, first, step, is_channel):
    """float32 (queries, channels): one pixel for each query, zero outside of the map."""
    position = (first + y * w + x).to(tl.int64)
    mask = _on_map(x, y, h, w)[:, None] & is_channel[None, :]
    return tl.load(base[None, :] + position[:, None] * step, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    value, levels, locations, weights, output,
    blocks, queries, heads, channels, stride_n, stride_s, stride_m, stride_d,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) // blocks
    item = (plane // heads).to(tl.int64)
    head = plane % heads
    query = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    live = query < queries
    is_channel = channel < channels
    base = value + item * stride_n + head.to(tl.int64) * stride_m + channel * stride_d
    row = (item * queries + query) * heads + head
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for level in range(LEVELS):
        h = tl.load(levels + 3 * level)
        w = tl.load(levels + 3 * level + 1)
        first = tl.load(levels + 3 * level + 2)
        for point in tl.static_range(POINTS):
            place = row * (LEVELS * POINTS) + level * POINTS + point
            weight = tl.load(weights + place, mask=live, other=0.0)
            left, top, a, b = _sample_place(locations, place, live, h, w)
            total += (weight * (1 - b) * (1 - a))[:, None] * _load_pixels(
                base, left, top, h, w, first, stride_s, is_channel
            )
            total += (weight * (1 - b) * a)[:, None] * _load_pixels(
                base, left + 1, top, h, w, first, stride_s, is_channel
            )
            total += (weight * b * (1 - a))[:, None] * _load_pixels(
                base, left, top + 1, h, w, first, stride_s, is_channel
            )
            total += (weight * b * a)[:, None] * _load_pixels(
                base, left + 1, top + 1, h, w, first, stride_s, is_channel
            )
    place = row[:, None] * channels + channel[None, :]
    tl.store(output + place, total.to(output.dtype.element_ty), mask=live[:, None] & is_channel[None, :])


@triton.jit
def _corner(
    g, value, grad_value, x, y, h, w, first, share, stride_s, step, is_channel, SCATTER: tl.constexpr
):  # fmt: skip
    """Product of `g` with the pixel, float32 (queries,); adds share * g to the pixel's gradient where SCATTER."""
    pixels = _load_pixels(value, x, y, h, w, first, stride_s, is_channel)
    if SCATTER:
        position = (first + y * w + x).to(tl.int64)
        mask = _on_map(x, y, h, w)[:, None] & is_channel[None, :]
        tl.atomic_add(grad_value[None, :] + position[:, None] * step, share[:, None] * g, mask=mask, sem="relaxed")
    return tl.sum(g * pixels, axis=1)


@triton.jit
def _backward_kernel(
    grad, value, levels, locations, weights, grad_value, grad_locations, grad_weights,
    blocks, queries, heads, channels, positions, stride_n, stride_s, stride_m, stride_d,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) // blocks
    item = (plane // heads).to(tl.int64)
    head = plane % heads
    query = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    live = query < queries
    is_channel = channel < channels
    base = value + item * stride_n + head.to(tl.int64) * stride_m + channel * stride_d
    sums = grad_value + (item * positions * heads + head) * channels + channel
    step = heads * channels
    row = (item * queries + query) * heads + head
    g = tl.load(
        grad + row[:, None] * channels + channel[None, :], mask=live[:, None] & is_channel[None, :], other=0.0
    ).to(tl.float32)
    for level in range(LEVELS):
        h = tl.load(levels + 3 * level)
        w = tl.load(levels + 3 * level + 1)
        first = tl.load(levels + 3 * level + 2)
        for point in tl.static_range(POINTS):
            place = row * (LEVELS * POINTS) + level * POINTS + point
            weight = tl.load(weights + place, mask=live, other=0.0)
            left, top, a, b = _sample_place(locations, place, live, h, w)
            e00 = _corner(
                g, base, sums, left, top, h, w, first, weight * (1 - b) * (1 - a), stride_s, step, is_channel, SCATTER
            )
            e01 = _corner(
                g, base, sums, left + 1, top, h, w, first, weight * (1 - b) * a, stride_s, step, is_channel, SCATTER
            )
            e10 = _corner(
                g, base, sums, left, top + 1, h, w, first, weight * b * (1 - a), stride_s, step, is_channel, SCATTER
            )
            e11 = _corner(
                g, base, sums, left + 1, top + 1, h, w, first, weight * b * a, stride_s, step, is_channel, SCATTER
            )
            by_weight = (1 - b) * ((1 - a) * e00 + a * e01) + b * ((1 - a) * e10 + a * e11)
            by_x = w * weight * ((1 - b) * (e01 - e00) + b * (e11 - e10))
            by_y = h * weight * ((1 - a) * (e10 - e00) + a * (e11 - e01))
            tl.store(grad_weights + place, by_weight, mask=live)
            tl.store(grad_locations + 2 * place, by_x, mask=live)
            tl.store(grad_locations + 2 * place + 1, by_y, mask=live)


@triton.jit
def _gather_kernel(
    grad, locations, weights, grad_value, blocks, queries, heads, channels, positions, level, h, w, first,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_S pixels of one level, item and head, and looks at every query's points in turn.

    What a sample gives to a pixel is its weight times max(0, 1 - |dx|) * max(0, 1 - |dy|), so that the gradient is a
    product of the matrix of these (pixels x queries) with the incoming gradient (queries x channels).
    """
    plane = tl.program_id(0) // blocks
    item = (plane // heads).to(tl.int64)
    head = plane % heads
    pixel = (tl.program_id(0) % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < channels
    x = (pixel % w).to(tl.float32)
    y = (pixel // w).to(tl.float32)
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for begin in range(0, queries, BLOCK_Q):
        query = begin + tl.arange(0, BLOCK_Q)
        live = query < queries
        row = (item * queries + query) * heads + head
        shares = tl.zeros((BLOCK_S, BLOCK_Q), tl.float32)
        for point in tl.static_range(POINTS):
            place = (row * LEVELS + level) * POINTS + point
            weight = tl.load(weights + place, mask=live, other=0.0)
            left, top, a, b = _sample_place(locations, place, live, h, w)
            along_x = 1 - tl.abs((left[None, :] - x[:, None]) + a[None, :])
            along_y = 1 - tl.abs((top[None, :] - y[:, None]) + b[None, :])
            near = (along_x > 0) & (along_y > 0)
            shares += tl.where(near, weight[None, :] * along_x * along_y, 0.0)
        g = tl.load(
            grad + row[:, None] * channels + channel[None, :], mask=live[:, None] & is_channel[None, :], other=0.0
        )
        total = tl.dot(shares, g.to(tl.float32), total, input_precision="ieee")
    place = ((item * positions + first + pixel) * heads + head)[:, None] * channels + channel[None, :]
    tl.store(grad_value + place, total, mask=(pixel < h * w)[:, None] & is_channel[None, :])
