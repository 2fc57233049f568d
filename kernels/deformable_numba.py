"""Multi-scale deformable attention on a CPU, compiled by numba: every item and head reads a plane of its own.

Source: kernels specification 1 (operator of Deformable DETR) and 6.1 (design). The first call of a process compiles or
reads the code that an earlier one left on disk. Nothing depends on the number of threads: a task owns what it writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from fewref.kernels.numba_vectors import add_scaled, below, dot, fetch, floor, keep, load, ones, store, zeros

Shapes = Sequence[tuple[int, int]]

# Channels at once: a power of two, so that few widths are compiled. Four sums of 64 fit the registers of AVX-512.
_WIDEST = 64
_LANES = 16  # points located at once
_MOST_POSITIONS = 2**24  # up to here float32 holds every whole number
_LINE = 16  # numbers that come from memory together
_AHEAD = 8  # queries between the request for their samples and the use of them
_WORTH_THREADS = 3_000_000  # samples times channels below which starting a thread costs more than it saves


def _compiled(function: Callable) -> Callable:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor for the user is there a place to keep the code
        return njit(**options)(function)


@_compiled
def locate(locations, at, points, levels, places, parts):
    """Find the four pixels around each point of one query and head, and the point's place among them.

    locations: flat, from `at` on (x,y) of K points; levels: (3,K') widths, heights and first positions of the points'
    maps, K' being K rounded up to whole `_LANES`; places: (2,K') to work in. Writes the rows of parts (12,K'):
    positions along S of the four corners, as floats, the first one -1 for a point outside (NaN too); shares of left,
    right, top, bottom; derivatives of these four after x, x, y, y. A corner outside of the map is drawn in, with share
    and derivative 0. Point by point, with branches that borders make hard to guess, this cost more than the samples.
    """
    row = levels.shape[1]
    for k in range(points):
        places[0, k], places[1, k] = locations[at + 2 * k], locations[at + 2 * k + 1]
    none = zeros(_LANES)
    one = ones(none)
    half, before = add_scaled(none, np.float32(0.5), one), none - one
    for k in range(0, row, _LANES):
        width, height, start = load(levels, k, none), load(levels, row + k, none), load(levels, 2 * row + k, none)
        u, v = load(places, k, none) * width - half, load(places, row + k, none) * height - half
        inside = below(before, u) * below(before, v) * below(u, width) * below(v, height)
        u, v = keep(u, inside), keep(v, inside)
        x, y = floor(u), floor(v)
        a, b = u - x, v - y
        has_left, has_right = one - below(x, none), below(x, width - one)
        has_top, has_bottom = one - below(y, none), below(y, height - one)
        left, right = x + one - has_left, x + has_right
        upper, lower = start + (y + one - has_top) * width, start + (y + has_bottom) * width
        store(parts, k, keep(upper + left + one, inside) - one)
        store(parts, row + k, upper + right)
        store(parts, 2 * row + k, lower + left)
        store(parts, 3 * row + k, lower + right)
        store(parts, 4 * row + k, (one - a) * has_left)
        store(parts, 5 * row + k, a * has_right)
        store(parts, 6 * row + k, (one - b) * has_top)
        store(parts, 7 * row + k, b * has_bottom)
        store(parts, 8 * row + k, none - width * has_left)
        store(parts, 9 * row + k, width * has_right)
        store(parts, 10 * row + k, none - height * has_top)
        store(parts, 11 * row + k, height * has_bottom)


@_compiled
def fetch_samples(locations, weights, cell, points):
    """Have the locations and weights of a query and head fetched, which lie far from those of the query before."""
    for k in range(cell * points, (cell + 1) * points, _LINE):
        fetch(weights, k)
        fetch(locations, 2 * k)
        fetch(locations, 2 * k + _LINE)


@_compiled
def copy_plane(like, width, positions, channels, source, base, row, target, target_base, target_row):
    """Copy the `channels` numbers of each position, `width` (as of `like`) at once; rows start at base, base + row."""
    for position in range(positions):
        for c in range(0, channels, width):
            for line in range(0, width, _LINE):
                fetch(source, base + (position + 2 * _AHEAD) * row + c + line)
            store(target, target_base + position * target_row + c, load(source, base + position * row + c, like))


@_compiled
def differentiate(points, weights, at, products, parts, grad_locations, grad_weights):
    """Gradients of the K samples from `at` on, from products (K,4) of the corners with the incoming gradient."""
    for k in range(points):
        to_x = to_y = to_weight = np.float32(0)
        if parts[0, k] >= 0:
            e00, e01, e10, e11 = products[k, 0], products[k, 1], products[k, 2], products[k, 3]
            upper, lower = parts[4, k] * e00 + parts[5, k] * e01, parts[4, k] * e10 + parts[5, k] * e11
            to_weight = parts[6, k] * upper + parts[7, k] * lower
            to_y = weights[at + k] * (parts[10, k] * upper + parts[11, k] * lower)
            upper, lower = parts[8, k] * e00 + parts[9, k] * e01, parts[8, k] * e10 + parts[9, k] * e11
            to_x = weights[at + k] * (parts[6, k] * upper + parts[7, k] * lower)
        grad_weights[at + k], grad_locations[2 * (at + k)], grad_locations[2 * (at + k) + 1] = to_weight, to_x, to_y


@lru_cache
def kernels(width: int) -> tuple[Callable, Callable]:
    """Forward and backward for heads whose channels are a multiple of `width`.

    The width must stay all that they take from here, or else numba does not find their code on disk again.

    Both run the tasks first to last of N * M, one item and head each. Arrays are flat float32, but for the levels of
    `locate`. strides: of item, position and head; sizes: (S, Q, M, D, K). packed: whether to copy each plane into one
    piece.
    """

    @_compiled
    def forward(value, strides, sizes, levels, locations, weights, output, packed, first, last):
        positions, queries, heads, channels, points = sizes
        none = zeros(width)
        places, parts = np.empty((2, levels.shape[1]), np.float32), np.empty((12, levels.shape[1]), np.float32)
        plane = np.empty(positions * channels if packed else 0, np.float32)
        for task in range(first, last):
            item, head = task // heads, task % heads
            source, base, row = value, item * strides[0] + head * strides[2], strides[1]
            if packed:
                copy_plane(none, width, positions, channels, value, base, row, plane, 0, channels)
                source, base, row = plane, 0, channels
            for query in range(queries):
                cell = (item * queries + query) * heads + head
                fetch_samples(locations, weights, cell + _AHEAD * heads, points)
                locate(locations, cell * points * 2, points, levels, places, parts)
                for c in range(0, channels, width):
                    s00 = s01 = s10 = s11 = none
                    for k in range(points):
                        if parts[0, k] >= 0:
                            upper = weights[cell * points + k] * parts[6, k]
                            lower = weights[cell * points + k] * parts[7, k]
                            left, right, at = parts[4, k], parts[5, k], base + c
                            s00 = add_scaled(s00, upper * left, load(source, at + np.int64(parts[0, k]) * row, none))
                            s01 = add_scaled(s01, upper * right, load(source, at + np.int64(parts[1, k]) * row, none))
                            s10 = add_scaled(s10, lower * left, load(source, at + np.int64(parts[2, k]) * row, none))
                            s11 = add_scaled(s11, lower * right, load(source, at + np.int64(parts[3, k]) * row, none))
                    store(output, cell * channels + c, (s00 + s01) + (s10 + s11))

    @_compiled
    def backward(grad, value, strides, sizes, levels, locations, weights, gradients, grad_strides, packed, first, last):
        # gradients: of value, locations and weights; that of value is written where packed, else added to.
        positions, queries, heads, channels, points = sizes
        grad_value, grad_locations, grad_weights = gradients
        none = zeros(width)
        places, parts = np.empty((2, levels.shape[1]), np.float32), np.empty((12, levels.shape[1]), np.float32)
        products = np.empty((points, 4), np.float32)
        plane = np.empty(positions * channels if packed else 0, np.float32)
        grad_plane = np.empty(positions * channels if packed else 0, np.float32)
        for task in range(first, last):
            item, head = task // heads, task % heads
            source, base, row = value, item * strides[0] + head * strides[2], strides[1]
            target, onto, step = grad_value, item * grad_strides[0] + head * grad_strides[2], grad_strides[1]
            if packed:
                copy_plane(none, width, positions, channels, value, base, row, plane, 0, channels)
                source, base, row = plane, 0, channels
                grad_plane[:] = 0
                target, onto, step = grad_plane, 0, channels
            for query in range(queries):
                cell = (item * queries + query) * heads + head
                fetch_samples(locations, weights, cell + _AHEAD * heads, points)
                locate(locations, cell * points * 2, points, levels, places, parts)
                products[:] = 0
                for c in range(0, channels, width):
                    fetch(grad, (cell + _AHEAD * heads) * channels + c)
                    incoming = load(grad, cell * channels + c, none)
                    for k in range(points):
                        if parts[0, k] >= 0:
                            for j in range(4):
                                position = np.int64(parts[j, k])
                                products[k, j] += dot(incoming, load(source, base + position * row + c, none))
                                share = weights[cell * points + k] * parts[4 + j % 2, k] * parts[6 + j // 2, k]
                                at = onto + position * step + c
                                store(target, at, add_scaled(load(target, at, none), share, incoming))
                differentiate(points, weights, cell * points, products, parts, grad_locations, grad_weights)
            if packed:
                base = item * grad_strides[0] + head * grad_strides[2]
                copy_plane(none, width, positions, channels, grad_plane, 0, channels, grad_value, base, grad_strides[1])

    return forward, backward


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Arguments and result of `deformable_attention.ms_deform_attn`, on a CPU and without a gradient.

    value: float32 or half types, (N,S,M,D), or (N,S,1,D) for one plane that all heads share; any strides. locations and
    weights: float32. Returns (N,Q,M*D) in the dtype of `value`, summed in float32. Raises ValueError for more than
    2**24 positions.
    """
    call = _Call(value, shapes, locations, weights)
    n, q, m = locations.shape[:3]
    if not (value.numel() and locations.numel()):
        return value.new_zeros(n, q, m * value.shape[3])
    output = torch.empty(n, q, m * value.shape[3])
    call.run(call.kernels[0], *call.arguments, _flat(output))
    return output.to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value (its dtype), locations and weights (float32) from that of the result, grad (N,Q,M*D)."""
    call = _Call(value, shapes, locations, weights)
    if not (value.numel() and locations.numel()):
        return tuple(given.new_zeros(given.shape) for given in (value, locations, weights))
    make = torch.empty if call.packed else torch.zeros
    grad_value = make(value.shape)
    grad_locations, grad_weights = torch.empty(locations.shape), torch.empty(weights.shape)
    n_s_m = (*grad_value.stride()[:2], grad_value.stride(2) if value.shape[2] > 1 else 0)
    gradients = (_flat(grad_value), _flat(grad_locations), _flat(grad_weights))
    call.run(call.kernels[1], _flat(grad.float().contiguous()), *call.arguments, gradients, n_s_m)
    return grad_value.to(value.dtype), grad_locations, grad_weights


class _Call:
    """What forward and backward share: flat arrays, the kernels for the width of the heads, and the threads."""

    def __init__(self, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
        _, positions, planes, channels = value.shape
        if positions > _MOST_POSITIONS:
            raise ValueError(f"{positions} positions are more than numba's kernel can count; take backend='pytorch'")
        n, q, m, levels, points, _ = locations.shape
        shared = planes == 1 or value.stride(2) == 0
        values = (value[:, :, :1] if shared else value).detach().float()  # copies no plane once per head
        values = values if values.stride(3) == 1 else values.contiguous()
        strides = (values.stride(0), values.stride(1), 0 if shared else values.stride(2))
        starts = np.cumsum([0, *(h * w for h, w in shapes)])
        table = np.full((3, -(-levels * points // _LANES) * _LANES), -2, np.float32)  # no point is inside of width -2
        for level, (h, w) in enumerate(shapes):
            if h * w:
                table[:, level * points : (level + 1) * points] = [[w], [h], [starts[level]]]
        self.arguments = (_flat(values), strides, (positions, q, m, channels, levels * points), table)
        self.arguments += (_flat(locations.float().contiguous()), _flat(weights.float().contiguous()))
        # A copy must repay itself. Heads that share a plane share its gradient: one task after the other adds to it.
        self.packed = q * levels * points >= positions and planes == m
        self.kernels = kernels(math.gcd(channels, _WIDEST))
        self.tasks, self.group = n * m, m if planes < m else 1
        self.work = n * q * m * levels * points * channels

    def run(self, kernel: Callable, *arguments: Any) -> None:
        """Run all tasks, in threads where the work repays them; what is given follows the call's own arguments."""
        threads = torch.get_num_threads() if self.work >= _WORTH_THREADS else 1
        step = self.group * max(1, math.ceil(self.tasks / (4 * threads * self.group)))
        if threads == 1:
            kernel(*arguments, self.packed, 0, self.tasks)
            return
        with ThreadPoolExecutor(threads) as pool:  # of this call alone: a pool that is kept would not survive a fork
            parts = [(first, min(first + step, self.tasks)) for first in range(0, self.tasks, step)]
            for done in [pool.submit(kernel, *arguments, self.packed, *part) for part in parts]:
                done.result()


def _flat(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor from its first number to its last; its last axis must have stride 1."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((extent if tensor.numel() else 0,), (1,)).numpy()
