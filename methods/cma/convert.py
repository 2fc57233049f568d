"""CMA's checkpoints: our parameter names are upstream's, so what is left is ties, leftovers and starting weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fewref.episodes.errors import InputError
from fewref.methods.weights import DROPPABLE, load_checkpoint, load_strict, looks_like, save_checkpoint

# The box heads are modules of the decoder too, so a state dict names them twice (cma.md section 4).
TIED = (("bbox_embed.", "transformer.decoder.bbox_embed."),)
# What a ReferFormer checkpoint does not give: its classes are others than CMA's single one (cma.md section 7).
REPLACED = ("class_embed.",)


def load_cma(network: nn.Module, path: Path) -> None:
    """Load a CMA checkpoint, upstream's or ours, so that every name fits. Raises InputError as `load_strict` does."""
    load_strict(network, load_checkpoint(path, TIED), DROPPABLE, path)


def save_cma(network: nn.Module, path: Path, metadata: Mapping[str, str], dtype: torch.dtype = torch.float16) -> None:
    """Write a CMA network as safetensors, tied tensors once. Raises InputError as `save_checkpoint` does."""
    save_checkpoint(path, network.state_dict(), metadata, dtype, TIED)


def start_from(network: nn.Module, path: Path) -> tuple[str, ...]:
    """Start training from a ReferFormer checkpoint: copy every tensor the two networks share but the class heads.
    A checkpoint of CMA gives the class heads too.

    Returns the names that keep their fresh values, sorted. Raises InputError for a file of another architecture, that
    is one with a shared name of another shape, or which shares too little to be a starting point.
    """
    state = load_checkpoint(path, TIED)
    own: Mapping[str, Tensor] = network.state_dict()
    replaced = () if "support_qkv.Key.weight" in state else REPLACED
    shared = {name: state[name] for name in own if name in state and not name.startswith(replaced)}
    if not any(name.startswith("backbone.") for name in shared) or not any(
        name.startswith("transformer.") for name in shared
    ):
        raise InputError(
            f"{path}: no starting point for CMA, since it shares no backbone or no transformer with the network; "
            f"it looks like {looks_like(state)}, the network is {looks_like(own)}"
        )
    load_strict(network, {**own, **shared}, (), path)
    return tuple(sorted(set(own) - set(shared)))
