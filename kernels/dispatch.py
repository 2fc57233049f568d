"""Which implementation of the operators runs; written into the header of every run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch.nn.attention import SDPBackend, sdpa_kernel

_TWICE = ContextVar("differentiable_twice", default=False)


def backend_in_use() -> str:
    """Name of the operators' implementation: "pytorch", built from PyTorch's own operators on every device."""
    return "pytorch"


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Inside, operators take forms whose gradient has a gradient: embedding bags and fused attention have none."""
    token = _TWICE.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _TWICE.reset(token)


def must_be_differentiable_twice() -> bool:
    """Whether the caller is inside of `differentiable_twice`."""
    return _TWICE.get()
