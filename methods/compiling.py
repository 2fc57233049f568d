"""`--compile`: torch.compile for the parts of a query network where it pays."""

from __future__ import annotations

import torch

from fewref.episodes.errors import InputError
from fewref.methods.layers.query_net import QueryNet
from fewref.methods.parts import backbone_body


def compile_parts(network: QueryNet, backend: str = "inductor") -> None:
    """Compile backbone, encoder layers and pixel decoder in place, each at its first call.

    Names of the state dict stay, and results but for float rounding. A second length or size of clips compiles once
    more, for any size. Raises InputError where nothing can be compiled for the network's device.
    """
    if backend == "inductor":
        check_compiler(next(network.parameters()).device)
    for part in (backbone_body(network), *network.transformer.encoder.layers, network.pixel_decoder):
        part.compile(backend=backend)


def check_compiler(device: torch.device) -> None:
    """Raises InputError, saying what to install, unless a trivial function can be compiled for the device."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.zeros(16, device=device))
    except Exception as error:  # what is raised depends on what is missing
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        wanted = "a C++ compiler such as g++" if device.type == "cpu" else "a C compiler such as gcc, and triton"
        raise InputError(f"--compile: cannot compile for {device.type} ({reason}); install {wanted}") from None
