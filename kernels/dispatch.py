"""Which implementation of the operators runs; written into the header of every run.

Neither numba nor Triton is imported before an operator is about to use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = ("reference", "pytorch", "numba", "triton")
ENVIRONMENT = "FEWREF_KERNELS"

# Forms of each operator, the fastest first. "reference" is the plain definition, "pytorch" its fast form in PyTorch's
# own operators on every device.
_FORMS = {
    "deformable_attention": ("numba", "triton", "pytorch", "reference"),
    "affinity": ("pytorch", "reference"),
    "dynamic_mask": ("pytorch", "reference"),
    "linear": ("pytorch", "reference"),
    "mask_scores": ("pytorch",),
}
OPS = tuple(_FORMS)
COMPILED = {"numba": "cpu", "triton": "cuda"}  # and the device that they are for
_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FORCED: ContextVar[str | None] = ContextVar("kernels", default=None)
_TWICE = ContextVar("differentiable_twice", default=False)


def choose(op: str, device: torch.device | str, dtype: torch.dtype = torch.float32, backend: str | None = None) -> str:
    """The backend that `op` runs on, one of `BACKENDS`.

    A backend is forced by the argument, else by `using`, else by the variable FEWREF_KERNELS; otherwise it is the
    fastest one that is installed for the device and dtype. An operator without a form in a forced backend, or none for
    the dtype, takes "pytorch". Unforced deformable attention in float64, and all of it inside of
    `differentiable_twice`, takes "reference". Raises ValueError for an unknown operator or backend, and for a forced
    backend that is not installed or cannot run on the device.
    """
    if op not in _FORMS:
        raise ValueError(f"{op!r} is no operator; there are {', '.join(OPS)}")
    forms, kind = _FORMS[op], torch.device(device).type
    by_environment = os.environ.get(ENVIRONMENT) or None
    forced = backend or _FORCED.get() or by_environment
    if forced:
        _check_name(forced, f"{ENVIRONMENT}=" if forced is by_environment else "kernels ")
    if op == "deformable_attention" and must_be_differentiable_twice():
        return "reference"
    if dtype not in _COMPILED_DTYPES:
        forms = tuple(name for name in forms if name not in COMPILED)
    if forced is None:
        if op == "deformable_attention" and dtype == torch.float64:
            return "reference"
        return next(name for name in forms if not _problem(name, kind, forced=False))
    if forced not in forms:
        return "pytorch"
    if problem := _problem(forced, kind, forced=True):
        raise ValueError(f"kernels {forced!r}: {problem}")
    return forced


# What torch.compiler.assume_constant_result does, which would import torch._dynamo: seconds, and Triton with it.
choose._dynamo_marked_constant = True


def report(device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """What runs for each operator, with the reason in parentheses where the device's compiled form cannot.

    J and F ("mask_scores") are counted in numpy, on packed bits, unless a GPU holds the masks, whatever is forced.
    Raises ValueError as `choose` does.
    """
    told, kind = {}, torch.device(device).type
    for op, forms in _FORMS.items():
        told[op] = choose(op, device, dtype)
        wanted = next((name for name in forms if COMPILED.get(name) == kind), None)
        if wanted and told[op] != wanted and _FORCED.get() is None and not os.environ.get(ENVIRONMENT):
            problem = import_problem(wanted)
            told[op] += f" ({problem})" if problem else ""
    return told if kind == "cuda" else told | {"mask_scores": "numpy"}


@contextmanager
def using(backend: str | None) -> Iterator[None]:
    """Force one backend inside; None leaves the choice free, unless FEWREF_KERNELS is set.

    Raises ValueError for a name that is none of `BACKENDS`, and for one that is not installed.
    """
    if backend is not None:
        _check_name(backend, "kernels ")
        if problem := import_problem(backend):
            raise ValueError(f"kernels {backend!r}: {problem}")
    token = _FORCED.set(backend)
    try:
        yield
    finally:
        _FORCED.reset(token)


def plain() -> bool:
    """Whether "reference" is forced, by `using` or FEWREF_KERNELS: then networks take no shortcut either."""
    return (_FORCED.get() or os.environ.get(ENVIRONMENT)) == "reference"


def _check_name(backend: str, source: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{source}{backend!r}: no such kernels; choose from {', '.join(BACKENDS)}")


def _problem(backend: str, kind: str, *, forced: bool) -> str:
    """Why `backend` cannot run on a kind of device, with the mend; "" if it can."""
    if backend not in COMPILED:
        return ""
    interpreted = backend == "triton" and kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and forced
    if kind != COMPILED[backend] and not interpreted:
        where = "a CUDA device, or with TRITON_INTERPRET=1 slowly on a CPU" if backend == "triton" else "a CPU"
        return f"runs on {where}, not on {kind!r}; choose another or leave the choice free"
    return import_problem(backend)


@lru_cache
def import_problem(backend: str) -> str:
    """Why the library of a backend cannot be imported, with the mend; "" if it can. Tried once per process."""
    if backend not in COMPILED:
        return ""
    if find_spec(backend) is None:
        return f"{backend} is not installed; pip install {backend}"
    try:
        import_module(backend)
    except Exception as error:  # beside unfit versions these raise more than ImportError
        reason = str(error).strip().partition("\n")[0]
        return f"{backend} cannot be imported ({type(error).__name__}: {reason}); reinstall {backend}"
    return ""


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Inside, operators take forms whose gradient has a gradient: compiled kernels and fused attention have none."""
    token = _TWICE.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _TWICE.reset(token)


def must_be_differentiable_twice() -> bool:
    """Whether the caller is inside of `differentiable_twice`."""
    return _TWICE.get()
