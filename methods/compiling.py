"""`--compile`: torch.compile for the parts of a query network where it pays."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import torch

from fewref.episodes.errors import InputError
from fewref.methods.layers.query_net import QueryNet
from fewref.methods.parts import Part, backbone_body, clip_parts


def compile_parts(network: QueryNet, backend: str = "inductor", parts: Sequence[Part] | None = None) -> None:
    """Compile the methods of some parts in place, by default `paying_parts`, each at its first call.

    Names of the state dict stay, and results but for float rounding. A second size compiles once more, for any size.
    Raises InputError where nothing can be compiled for the network's device.
    """
    if backend == "inductor":
        check_compiler(next(network.parameters()).device)
    compiled = {}
    for part, name in paying_parts(network) if parts is None else parts:
        function = getattr(type(part), name)
        if function not in compiled:  # parts of one kind share what is compiled
            compiled[function] = torch.compile(function, backend=backend, recompile_limit=32)
        setattr(part, name, MethodType(compiled[function], part))


def paying_parts(network: QueryNet) -> list[Part]:
    """The backbone, and on a GPU also encoder layers and pixel decoder.

    On a CPU these work in pieces that fit the caches, with oneDNN's products: compiled they take half as long again.
    """
    parts = [(backbone_body(network), "forward")]
    return parts if next(network.parameters()).device.type == "cpu" else parts + clip_parts(network)


def check_compiler(device: torch.device) -> None:
    """Raises InputError, saying what to install, unless a trivial function can be compiled for the device."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.zeros(16, device=device))
    except Exception as error:  # what is raised depends on what is missing
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        wanted = "a C++ compiler such as g++" if device.type == "cpu" else "a C compiler such as gcc, and triton"
        raise InputError(f"--compile: cannot compile for {device.type} ({reason}); install {wanted}") from None
