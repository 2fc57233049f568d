"""Gradient checkpointing of a query network from outside: less memory in training, for a second forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fewref.methods.layers.query_net import QueryNet
from fewref.methods.parts import backbone_body, blocks, clip_parts


@contextmanager
def checkpointed(network: QueryNet) -> Iterator[None]:
    """Inside, blocks of backbone and pixel decoder and encoder layers keep only their inputs for `backward`.

    What else the gradients need is computed again, with the same dropout: outputs and gradients are those without.
    `backward` must be called before a weight is changed or exchanged. Names of the state dict stay.
    """
    parts = [(block, "forward") for block in blocks(backbone_body(network))] + clip_parts(network)
    for part, name in parts:
        setattr(part, name, partial(_forget_inside, getattr(part, name)))
    try:
        yield
    finally:
        for part, name in parts:
            delattr(part, name)


def _forget_inside(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # a frozen part has nothing to keep
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
