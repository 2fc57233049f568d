"""Checkpoints that come with the project: trained on the built-in data, one per method and group.

Each is a folder `methods/checkpoints/<method>-<dataset>-<group>`: weights.safetensors and training.json. Meta-learned
ones are called `<method>+<strategy>-<dataset>-<group>`.
"""

from __future__ import annotations

from pathlib import Path

from fewref.episodes.errors import InputError, near
from fewref.methods.adaptation.options import META
from fewref.methods.base import UNTRAINED

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


def shipped_names() -> tuple[str, ...]:
    """Names of the shipped checkpoints, as `--weights` takes them, sorted."""
    return tuple(sorted(path.parent.name for path in CHECKPOINTS.glob("*/weights.safetensors")))


def shipped_folder(method: str, dataset: str, group: str) -> Path:
    """Where the checkpoint of a method, dataset and group lies, or would lie."""
    return CHECKPOINTS / f"{method}-{dataset}-{group}"


def find_weights(
    method: str, weights: str | None, config: str, dataset: str, group: str, strategy: str = "none"
) -> Path | str:
    """The checkpoint to use: a file, a shipped one by name, "untrained", or, with None, the shipped one that fits.

    For a meta-learned strategy that is the one trained for it and, where none is shipped, the method's plain one.
    Raises InputError where there is none.
    """
    if weights is None:
        called = [f"{method}+{strategy}", method] if strategy in META else [method]
        for name in called if config == "tiny" else ():
            folder = shipped_folder(name, dataset, group)
            if folder.name in shipped_names():
                return folder / "weights.safetensors"
        raise InputError(
            f"no checkpoint of {method} is shipped for {dataset}, group {group}, config {config}; give --weights FILE"
        )
    return UNTRAINED if weights == UNTRAINED else named_file(weights, "--weights")


def named_file(name: str, option: str) -> Path:
    """A checkpoint file, or a shipped one by name. Raises InputError, naming the option, where there is none."""
    if Path(name).is_file():
        return Path(name)
    if name in shipped_names():
        return CHECKPOINTS / name / "weights.safetensors"
    raise InputError(f"{option} {name}: no such file, nor a shipped checkpoint; {near(name, shipped_names())}")
