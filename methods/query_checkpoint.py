"""Checkpoints of query networks: our parameter names are upstream's, what is left is ties and starting weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fewref.episodes.errors import InputError
from fewref.methods.weights import DROPPABLE, Tied, is_safetensors, load_checkpoint, load_strict, looks_like

# The box heads are modules of the decoder too, so a state dict names them twice (CMA specification 4).
TIED = (("bbox_embed.", "transformer.decoder.bbox_embed."),)
# What a starting point may not give: the classes of ReferFormer's pretraining are others than the single one of an
# episode (specifications of CMA, 7, and of ReferFormer, 8).
CLASS_HEADS = "class_embed."
MEMORY = "support_qkv.Key.weight"


def load_network(network: nn.Module, path: Path) -> None:
    """Load a checkpoint, upstream's or ours, so that every name fits. Raises InputError as `load_strict` does."""
    load_strict(network, load_checkpoint(path, tied_in(network)), DROPPABLE, path)


def tied_in(network: nn.Module) -> Tied:
    """What of `TIED` holds for a network: nothing where boxes are not refined, as the decoder has no heads then."""
    return tuple(pair for pair in TIED if any(name.startswith(pair[1]) for name in network.state_dict()))


def start_from(network: nn.Module, path: Path) -> tuple[str, ...]:
    """Start training from a checkpoint of the same method or of one that shares most of its network.

    Copies every tensor that both have, the class heads only where the file belongs to the same kind of network: both
    with a support memory, or both without and the file one of ours (safetensors), for ReferFormer's own files are
    pretrained on other classes. Returns the names that keep their fresh values, sorted. Raises InputError for a file
    of another architecture, that is one with a shared name of another shape, or which shares too little to be a
    starting point.
    """
    state = load_checkpoint(path, tied_in(network))
    own: Mapping[str, Tensor] = network.state_dict()
    alike = MEMORY in state if MEMORY in own else MEMORY not in state and is_safetensors(path)
    shared = {name: state[name] for name in own if name in state and (alike or not name.startswith(CLASS_HEADS))}
    if not any(name.startswith("backbone.") for name in shared) or not any(
        name.startswith("transformer.") for name in shared
    ):
        raise InputError(
            f"{path}: no starting point, since it shares no backbone or no transformer with the network; "
            f"it looks like {looks_like(state)}, the network is {looks_like(own)}"
        )
    load_strict(network, {**own, **shared}, (), path)
    return tuple(sorted(set(own) - set(shared)))
