"""Multi-scale deformable attention: weighted bilinear samples of several feature maps.

Operator of Deformable DETR (Zhu et al., ICLR 2021; fundamentalvision/Deformable-DETR), on the fastest backend at hand.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewref.kernels.deformable_reference import Shapes, sample_by_bags, sample_by_grid, suits_bags
from fewref.kernels.dispatch import choose

_MODULES = {"numba": "fewref.kernels.deformable_numba", "triton": "fewref.kernels.deformable_triton"}


def ms_deform_attn(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, backend: str | None = None
) -> Tensor:
    """Sample `value` at `locations` and sum with `weights`, head by head.

    value: (N,S,M,D), the levels one after the other along S, each row-major, or (N,S,1,D) where all heads share one
    plane, which spares a gradient per head; never copied per head, views expanded over M neither. shapes: L pairs (h,w)
    with S = sum h*w. locations: (N,Q,M,L,P,2) as (x,y), 0 and 1 being the outer edges of a map, any real value (zero
    outside the map). weights: (N,Q,M,L,P), any values. backend: see `dispatch.choose`. Returns (N,Q,M*D) in the dtype
    of `value`; computed in float32 at least, since half types cannot hold coordinates. Raises ValueError where the
    arguments do not fit each other, and as `choose` does.
    """
    _check(value, shapes, locations, weights)
    wide = torch.promote_types(value.dtype, torch.float32)
    locations, weights = locations.to(wide), weights.to(wide)
    chosen = choose("deformable_attention", value.device, value.dtype, backend)
    if chosen in _MODULES:
        return _sample(value, [size for shape in shapes for size in shape], locations, weights, chosen)
    bags = chosen == "pytorch" and suits_bags(value, locations)
    value_of_all = value.to(wide).expand(-1, -1, locations.shape[2], -1)
    with torch.autocast(value.device.type, enabled=False):
        return (sample_by_bags if bags else sample_by_grid)(value_of_all, shapes, locations, weights).to(value.dtype)


def _check(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    if sum(h * w for h, w in shapes) != value.shape[1]:
        raise ValueError(f"levels {list(shapes)} do not add up to {value.shape[1]} positions")
    n, q, m, levels, points, _ = locations.shape
    if value.shape[0] != n or value.shape[2] not in (1, m) or levels != len(shapes) or locations.shape[-1] != 2:
        fits = f"(N,S,M,D) {tuple(value.shape)}, {len(shapes)} levels, locations {tuple(locations.shape)}"
        raise ValueError(f"items, heads or levels of value and locations differ: {fits}")
    if weights.shape != (n, q, m, levels, points):
        raise ValueError(f"weights {tuple(weights.shape)} do not fit locations {tuple(locations.shape)}")


def _pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _module(backend: str) -> ModuleType:
    return import_module(_MODULES[backend])


# Registered with PyTorch, so that torch.compile and torch.export take the compiled kernels as they are.
_SAMPLES = "Tensor value, int[] sizes, Tensor locations, Tensor weights, str backend"


@torch.library.custom_op("fewref::ms_deform_attn", mutates_args=(), schema=f"({_SAMPLES}) -> Tensor")
def _sample(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        value = value.expand(-1, -1, locations.shape[2], -1)
    return _module(backend).forward(value, _pairs(sizes), locations, weights)


@_sample.register_fake
def _(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    n, q, m = locations.shape[:3]
    return value.new_empty(n, q, m * value.shape[3])


@torch.library.custom_op(
    "fewref::ms_deform_attn_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_SAMPLES}) -> (Tensor, Tensor, Tensor)",
)
def _differentiate(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    m = locations.shape[2]
    planes = value.expand(-1, -1, m, -1) if backend == "triton" else value
    grads = _module(backend).backward(grad, planes, _pairs(sizes), locations, weights)
    if planes.shape != value.shape:
        grads = (grads[0].sum(2, keepdim=True), *grads[1:])
    return grads


@_differentiate.register_fake
def _(
    grad: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.sizes, locations, weights, ctx.backend = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    value, locations, weights = ctx.saved_tensors
    to_value, to_locations, to_weights = _differentiate(grad, value, ctx.sizes, locations, weights, ctx.backend)
    return to_value, None, to_locations, to_weights, None


_sample.register_autograd(_backward, setup_context=_remember)
