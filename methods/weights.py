"""Checkpoint files: read without running what is inside, load under every name, write in half precision.

Upstream methods publish `torch.save` files, some in the format from before PyTorch 1.6, with an `argparse.Namespace`
beside the weights. Ours are safetensors files, where a tensor that two names share is stored once.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fewref.episodes.errors import InputError, write_atomic

# Buffers without trained content: position ids of older transformers versions, counters of a profiling tool.
DROPPABLE = ("text_encoder.embeddings.position_ids", "*total_params", "*total_ops")
# What upstream files hold beside tensors: the options of the run, and the milestones of its learning-rate schedule.
SAFE_CLASSES = [argparse.Namespace, collections.Counter]
CONTAINERS = ("model", "state_dict")

Tied = Sequence[tuple[str, str]]
"""Pairs (alias prefix, kept prefix): a tensor named alias + x is the very tensor named kept + x."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal. Raises InputError where the file cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()


def load_checkpoint(path: Path, tied: Tied = ()) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint onto the CPU in the precision of the file; code in it is never run.

    path: a safetensors file or a `torch.save` file (zip or legacy), bare or wrapped as {"model": ...}. Names that
    `tied` calls for and the file lacks are added. Raises InputError for a missing, damaged or unsafe file, one that
    holds no state dict, and one whose tied names disagree.
    """
    path = Path(path)
    state = read_safetensors(path) if is_safetensors(path) else read_torch(path)
    return restore_tied(state, tied, path)


def load_strict(module: nn.Module, state: Mapping[str, Tensor], droppable: Sequence[str], path: Path) -> None:
    """Copy a state dict into a module so that every name and shape must fit; precision follows the module.

    droppable: patterns (shell style) of names to ignore where the module lacks them; `DROPPABLE` is the usual list.
    Raises InputError naming `path`, the first names at fault and the architecture that the file looks like.
    """
    own = module.state_dict()
    state = {
        name: tensor
        for name, tensor in state.items()
        if name in own or not any(fnmatchcase(name, pattern) for pattern in droppable)
    }
    faults = [
        some("missing", [name for name in own if name not in state]),
        some("unexpected", [name for name in state if name not in own]),
        some("of another shape or kind", [clash(name, state[name], own[name]) for name in own if name in state]),
    ]
    if faults := [fault for fault in faults if fault]:
        raise InputError(
            f"{path}: does not fit this network: {'; '.join(faults)}; the file looks like {looks_like(state)}, "
            f"the network is {looks_like(own)}; choose weights and configuration that belong together"
        )
    module.load_state_dict(state)


def save_checkpoint(
    path: Path,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
    tied: Tied = (),
) -> None:
    """Write a state dict as a safetensors file, floating tensors as `dtype`, aliases of `tied` left out.

    The file appears whole or not at all. Raises InputError where it cannot be written or a finite value is beyond the
    range of `dtype`.
    """
    tensors = {}
    for name, tensor in state.items():
        if any(name.startswith(alias) and kept + name[len(alias) :] in state for alias, kept in tied):
            continue
        tensor = tensor.detach().cpu()
        stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not torch.equal(torch.isfinite(stored), torch.isfinite(tensor)):
            raise InputError(f"{path}: {name} holds values too large for {dtype}; save it as torch.float32")
        tensors[name] = stored.clone(memory_format=torch.contiguous_format)
    write_atomic(path, _sorted_header(safetensors.torch.save(tensors, metadata=dict(metadata or {}))))


def _sorted_header(data: bytes) -> bytes:
    # The library writes the text entries in an order that changes from call to call; equal weights make equal bytes.
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entries = dict(sorted(header.pop("__metadata__", {}).items()))
    text = json.dumps({"__metadata__": entries, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries which `save_checkpoint` wrote; empty for `torch.save` files. Raises InputError as it reads."""
    if not is_safetensors(path):
        return {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        raise damaged(path) from None


def looks_like(state: Mapping[str, Tensor]) -> str:
    """In words, the architecture whose names and shapes these are: network, use_dab, backbone (cma.md 4 and 5)."""
    parts = []
    if any(name.startswith(("support_qkv.", "query_qkv.")) for name in state):
        parts.append("CMA")
    elif any(name.startswith("controller.") for name in state):
        parts.append("ReferFormer" if "query_embed.weight" in state else "a network with dynamic masks")
    if "refpoint_embed.weight" in state:
        parts.append("use_dab=True")
    elif "transformer.reference_points.weight" in state:
        parts.append("use_dab=False (non-DAB)")
    if backbone := backbone_of(state):
        parts.append(f"backbone {backbone}")
    return " ".join(parts) or "no network known here"


def backbone_of(state: Mapping[str, Tensor]) -> str:
    """Name of the backbone in a state dict, bare or behind `backbone.0.body.`; "" where there is none."""
    prefix = "backbone.0.body." if any(name.startswith("backbone.0.body.") for name in state) else ""
    patch = state.get(f"{prefix}patch_embed.proj.weight")
    if patch is not None:
        deep = f"{prefix}layers.2.blocks.17.norm1.weight" in state
        family = "video_swin" if patch.ndim == 5 else "swin"
        size = {96: "s" if deep else "t", 128: "b", 192: "l"}.get(patch.shape[0])
        return f"{family}_{size}_p4w7" if size else f"{family} of width {patch.shape[0]}"
    if f"{prefix}stem.0.0.weight" in state:
        return "tiny_resnet"
    if blocks := sum(fnmatchcase(name, f"{prefix}layer3.*.conv3.weight") for name in state):
        return {6: "resnet50", 23: "resnet101"}.get(blocks, f"resnet with {blocks} blocks in layer3")
    return ""


def restore_tied(state: Mapping[str, Tensor], tied: Tied, path: Path) -> dict[str, Tensor]:
    """The state dict with both names of every tied tensor. Raises InputError where a file gives them unequal values."""
    state = dict(state)
    for alias, kept in tied:
        for name in [name for name in state if name.startswith(kept)]:
            twin = alias + name[len(kept) :]
            if not same(state.setdefault(twin, state[name]), state[name]):
                raise InputError(
                    f"{path}: {twin} and {name} are one tensor in the network but differ; get a sound file"
                )
        for name in [name for name in state if name.startswith(alias)]:
            state.setdefault(kept + name[len(alias) :], state[name])
    return state


def is_safetensors(path: Path) -> bool:
    """Whether a file is meant as safetensors: by its name, or by a length and then JSON at its start."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{" or Path(path).suffix == ".safetensors"
    except OSError as error:
        raise unreadable(path, error) from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError):
        raise damaged(path) from None


def read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol, on the way to a refusal
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\w+\.[\w.]+)", str(error)):
            raise InputError(
                f"{path}: refused, since it holds Python code or objects ({named[1]}) beside plain tensors; "
                "re-save the state dict alone where you trust its source"
            ) from None
        raise damaged(path) from None
    except Exception:  # a damaged file may break the parser anywhere, and each place raises its own kind
        raise damaged(path) from None
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path}: holds no state dict (found {type(content).__name__}); choose a checkpoint of a network"
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor; choose a plain state dict")
    return dict(content)


def same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def some(fault: str, names: Sequence[str | None], shown: int = 3) -> str:
    """`3 missing (a, b, c)`, with the first few names only; "" where there are none."""
    names = [name for name in names if name]
    rest = ", ..." if len(names) > shown else ""
    return f"{len(names)} {fault} ({', '.join(names[:shown])}{rest})" if names else ""


def clash(name: str, theirs: Tensor, ours: Tensor) -> str | None:
    """What keeps a tensor of the file from being copied into the network's, or None."""
    if theirs.shape != ours.shape:
        return f"{name} {tuple(theirs.shape)} for {tuple(ours.shape)}"
    if theirs.is_floating_point() != ours.is_floating_point():
        return f"{name} {theirs.dtype} for {ours.dtype}"
    return None


def unreadable(path: Path, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file; give the path of a checkpoint")
    return InputError(f"{path}: cannot be read ({error.strerror or error})")


def damaged(path: Path) -> InputError:
    # PyTorch's own words are left out: they advise to load the file with code in it allowed.
    return InputError(f"{path}: not a checkpoint, or damaged or cut short; download or write it again")
