"""The parts of a query network in which nearly all of its time and memory go."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fewref.methods.layers.query_net import QueryNet

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Part = tuple[nn.Module, str]  # a module and the name of its method that is called


def backbone_body(network: QueryNet) -> nn.Module:
    """The image backbone itself."""
    return network.backbone[0].body


def clip_parts(network: QueryNet) -> list[Part]:
    """Encoder layers and the pixel decoder's convolutions and blocks: what works on all pixels behind the backbone."""
    parts = [*network.transformer.encoder.layers, *blocks(network.pixel_decoder)]
    halves = {part: [name for name in ("look_around", "read") if hasattr(part, name)] for part in parts}
    return [(part, name) for part in parts for name in halves[part] or ("forward",)]


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below `module`, looking through containers, that are themselves made of modules; none is in
    another."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from blocks(child)
        elif any(True for _ in child.children()):
            yield child
