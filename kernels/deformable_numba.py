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
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, models, register_model
from torch import Tensor

Shapes = Sequence[tuple[int, int]]

# Channels at once: a power of two, so that few widths are compiled. Four sums of 64 fit the registers of AVX-512.
_WIDEST = 64
_LINE = 16  # numbers that come from memory together
_AHEAD = 8  # queries between the request for their samples and the use of them
_WORTH_THREADS = 3_000_000  # samples times channels below which starting a thread costs more than it saves


# Vectors of float32 as values of numba: loops over channels would be vectorised only with checks for overlap around
# every point, and would keep their sums in memory instead of registers.


class Vector(types.Type):
    """`width` float32 side by side."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Vector({width})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.FloatType(), kind.width))


def _pointer(context: Any, builder: Any, kind: Any, array: Any, offset: Any, to: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), to.as_pointer())


def _declared(builder: Any, name: str, kind: Any) -> Any:
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@intrinsic(prefer_literal=True)
def zeros(typing: Any, width: Any) -> Any:
    """zeros(width) -> Vector; `width` a constant."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return Vector(width.literal_value)(width), generate


@intrinsic
def load(typing: Any, array: Any, offset: Any, like: Any) -> Any:
    """load(array, offset, like) -> Vector from `offset` on, of the width of the vector `like`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return builder.load(_pointer(context, builder, array, values[0], values[1], kind), align=4)

    return like(array, types.int64, like), generate


@intrinsic
def store(typing: Any, array: Any, offset: Any, vector: Any) -> Any:
    """store(array, offset, vector): array[offset : offset + width] = vector."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], _pointer(context, builder, array, values[0], values[1], values[2].type), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


@intrinsic
def add_scaled(typing: Any, total: Any, scale: Any, vector: Any) -> Any:
    """add_scaled(total, scale, vector) -> total + scale * vector, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        base, factor, vector = values
        kind, nothing = vector.type, ir.Constant(vector.type, ir.Undefined)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
        first = builder.insert_element(nothing, factor, ir.Constant(ir.IntType(32), 0))
        factors = builder.shuffle_vector(first, nothing, lanes)
        return builder.fadd(base, builder.fmul(factors, vector, flags=("contract",)), flags=("contract",))

    return total(total, types.float32, vector), generate


@intrinsic
def add(typing: Any, one: Any, other: Any) -> Any:
    """add(one, other) -> one + other."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fadd(*values)

    return one(one, other), generate


@intrinsic
def dot(typing: Any, one: Any, other: Any) -> Any:
    """dot(one, other) -> the sum of their products, in an order fixed by the width."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        products, real = builder.fmul(*values), ir.FloatType()
        kind = ir.FunctionType(real, [real, products.type])
        reduce = _declared(builder, f"llvm.vector.reduce.fadd.v{products.type.count}f32", kind)
        return builder.call(reduce, [ir.Constant(real, 0.0), products], fastmath=("reassoc",))

    return types.float32(one, other), generate


@intrinsic
def fetch(typing: Any, array: Any, offset: Any) -> Any:
    """fetch(array, offset): a hint that array[offset] is about to be read; harmless beyond its end."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, array, values[0], values[1], ir.IntType(8))
        whole = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, whole, whole, whole])
        hints = [ir.Constant(whole, number) for number in (0, 3, 1)]  # to read, to be kept, data
        builder.call(_declared(builder, "llvm.prefetch.p0", kind), [pointer, *hints])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def _compiled(function: Callable) -> Callable:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor for the user is there a place to keep the code
        return njit(**options)(function)


@_compiled
def locate(locations, at, levels, corners, parts):
    """Find the four pixels around each point of one query and head, and the point's place among them.

    locations: flat, from `at` on (x,y) of K points; levels: (K,3) width, height and first position of the point's map.
    Writes corners (K,4), positions along S, the first one -1 for a point outside (NaN too); and parts (K,8): shares of
    left, right, top, bottom, then the derivatives of the four after x, x, y, y. A corner outside of the map is drawn
    in, with share and derivative 0.
    """
    for k in range(len(levels)):
        width, height = levels[k, 0], levels[k, 1]
        u = locations[at + 2 * k] * np.float32(width) - np.float32(0.5)
        v = locations[at + 2 * k + 1] * np.float32(height) - np.float32(0.5)
        # In floats: the conversion of a large one to an integer is undefined.
        if not (u > -1 and v > -1 and u < width and v < height and width > 0 and height > 0):
            corners[k, 0] = -1
            continue
        left, top = np.floor(u), np.floor(v)
        a, b = u - left, v - top
        x, y = np.int64(left), np.int64(top)
        one, none = np.float32(1), np.float32(0)
        has_left, has_right = one if x >= 0 else none, one if x + 1 < width else none
        has_top, has_bottom = one if y >= 0 else none, one if y + 1 < height else none
        parts[k, 0], parts[k, 1] = (one - a) * has_left, a * has_right
        parts[k, 2], parts[k, 3] = (one - b) * has_top, b * has_bottom
        parts[k, 4], parts[k, 5] = -np.float32(width) * has_left, np.float32(width) * has_right
        parts[k, 6], parts[k, 7] = -np.float32(height) * has_top, np.float32(height) * has_bottom
        upper = levels[k, 2] + max(y, 0) * width
        lower = levels[k, 2] + min(y + 1, height - 1) * width
        corners[k, 0], corners[k, 1] = upper + max(x, 0), upper + min(x + 1, width - 1)
        corners[k, 2], corners[k, 3] = lower + max(x, 0), lower + min(x + 1, width - 1)


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
def differentiate(points, weights, at, products, corners, parts, grad_locations, grad_weights):
    """Gradients of the K samples from `at` on, from products (K,4) of the corners with the incoming gradient."""
    for k in range(points):
        to_x = to_y = to_weight = np.float32(0)
        if corners[k, 0] >= 0:
            e00, e01, e10, e11 = products[k, 0], products[k, 1], products[k, 2], products[k, 3]
            upper, lower = parts[k, 0] * e00 + parts[k, 1] * e01, parts[k, 0] * e10 + parts[k, 1] * e11
            to_weight = parts[k, 2] * upper + parts[k, 3] * lower
            to_y = weights[at + k] * (parts[k, 6] * upper + parts[k, 7] * lower)
            upper, lower = parts[k, 4] * e00 + parts[k, 5] * e01, parts[k, 4] * e10 + parts[k, 5] * e11
            to_x = weights[at + k] * (parts[k, 2] * upper + parts[k, 3] * lower)
        grad_weights[at + k], grad_locations[2 * (at + k)], grad_locations[2 * (at + k) + 1] = to_weight, to_x, to_y


@lru_cache
def kernels(width: int) -> tuple[Callable, Callable]:
    """Forward and backward for heads whose channels are a multiple of `width`.

    The width must stay all that they take from here, or else numba does not find their code on disk again.

    Both run the tasks first to last of N * M, one item and head each. Arrays are flat float32, but for levels (K,3).
    strides: of item, position and head; sizes: (S, Q, M, D). packed: whether to copy each plane into one piece.
    """

    @_compiled
    def forward(value, strides, sizes, levels, locations, weights, output, packed, first, last):
        positions, queries, heads, channels = sizes
        points, none = len(levels), zeros(width)
        corners, parts = np.empty((points, 4), np.int64), np.empty((points, 8), np.float32)
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
                locate(locations, cell * points * 2, levels, corners, parts)
                for c in range(0, channels, width):
                    s00 = s01 = s10 = s11 = none
                    for k in range(points):
                        if corners[k, 0] >= 0:
                            upper = weights[cell * points + k] * parts[k, 2]
                            lower = weights[cell * points + k] * parts[k, 3]
                            left, right, at = parts[k, 0], parts[k, 1], base + c
                            s00 = add_scaled(s00, upper * left, load(source, at + corners[k, 0] * row, none))
                            s01 = add_scaled(s01, upper * right, load(source, at + corners[k, 1] * row, none))
                            s10 = add_scaled(s10, lower * left, load(source, at + corners[k, 2] * row, none))
                            s11 = add_scaled(s11, lower * right, load(source, at + corners[k, 3] * row, none))
                    store(output, cell * channels + c, add(add(s00, s01), add(s10, s11)))

    @_compiled
    def backward(grad, value, strides, sizes, levels, locations, weights, gradients, grad_strides, packed, first, last):
        # gradients: of value, locations and weights; that of value is written where packed, else added to.
        positions, queries, heads, channels = sizes
        grad_value, grad_locations, grad_weights = gradients
        points, none = len(levels), zeros(width)
        corners, parts = np.empty((points, 4), np.int64), np.empty((points, 8), np.float32)
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
                locate(locations, cell * points * 2, levels, corners, parts)
                products[:] = 0
                for c in range(0, channels, width):
                    fetch(grad, (cell + _AHEAD * heads) * channels + c)
                    incoming = load(grad, cell * channels + c, none)
                    for k in range(points):
                        if corners[k, 0] >= 0:
                            for j in range(4):
                                products[k, j] += dot(incoming, load(source, base + corners[k, j] * row + c, none))
                                share = weights[cell * points + k] * parts[k, j % 2] * parts[k, 2 + j // 2]
                                at = onto + corners[k, j] * step + c
                                store(target, at, add_scaled(load(target, at, none), share, incoming))
                differentiate(points, weights, cell * points, products, corners, parts, grad_locations, grad_weights)
            if packed:
                base = item * grad_strides[0] + head * grad_strides[2]
                copy_plane(none, width, positions, channels, grad_plane, 0, channels, grad_value, base, grad_strides[1])

    return forward, backward


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Arguments and result of `deformable_attention.ms_deform_attn`, on a CPU and without a gradient.

    value: float32 or half types, (N,S,M,D), or (N,S,1,D) for one plane that all heads share; any strides. locations and
    weights: float32. Returns (N,Q,M*D) in the dtype of `value`, summed in float32.
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
        n, q, m, levels, points, _ = locations.shape
        shared = planes == 1 or value.stride(2) == 0
        values = (value[:, :, :1] if shared else value).detach().float()  # copies no plane once per head
        values = values if values.stride(3) == 1 else values.contiguous()
        strides = (values.stride(0), values.stride(1), 0 if shared else values.stride(2))
        starts = np.cumsum([0, *(h * w for h, w in shapes)])
        rows = [(w, h, starts[level]) for level, (h, w) in enumerate(shapes) for _ in range(points)]
        self.arguments = (_flat(values), strides, (positions, q, m, channels), np.array(rows, np.int64).reshape(-1, 3))
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
