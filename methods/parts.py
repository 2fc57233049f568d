"""The parts of a query network in which nearly all of its time and memory go."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from fewref.methods.layers.query_net import QueryNet

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def backbone_body(network: QueryNet) -> nn.Module:
    """The image backbone itself."""
    return network.backbone[0].body


def clip_blocks(network: QueryNet) -> list[nn.Module]:
    """Encoder layers and the blocks of the pixel decoder: what works on all pixels of a clip behind the backbone."""
    return [*network.transformer.encoder.layers, *blocks(network.pixel_decoder)]


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below `module`, looking through containers, that are themselves made of modules; none is in
    another."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from blocks(child)
        elif any(True for _ in child.children()):
            yield child
