"""What a command is given: dataset folders, groups, episodes, devices and run folders, found and checked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewref.benchmark.protocol import Protocol
from fewref.benchmark.store import shards_in
from fewref.episodes.errors import InputError, near
from fewref.episodes.manifest import FROZEN, Manifest, check_matches, find_manifest, read_manifest
from fewref.episodes.readers import DatasetIndex, read_index
from fewref.episodes.sampler import build_manifest, episode_protocol
from fewref.episodes.synthetic import FOLDERS, write_synthetic
from fewref.splits import load_split

BUILTIN_ROOT, PRETRAIN_ROOT = Path("runs/builtin-data"), Path("runs/builtin-pretrain-data")
PRETRAIN_VIDEOS = 30  # per category


def open_dataset(dataset: str, root: Path | None) -> DatasetIndex:
    """The index of a dataset. root: its folder; the built-in data are written to `BUILTIN_ROOT` (or root) where absent.

    Raises InputError for an unknown dataset, and where no root is given for one that is not built in.
    """
    layout = load_split(dataset).layout
    if not dataset.startswith("builtin"):
        if root is None:
            raise InputError(f"--data-root is missing: the folder of {dataset}")
        return read_index(dataset, root)
    pretraining = dataset == "builtin-pretrain"
    root = Path(root or (PRETRAIN_ROOT if pretraining else BUILTIN_ROOT))
    if not root.exists():
        print(f"writing the built-in data to {root}", flush=True)
        if pretraining:
            write_synthetic(root, videos_per_category=PRETRAIN_VIDEOS, layouts=("pretrain",))
        else:
            write_synthetic(root)
    beneath = root / FOLDERS["pretrain" if pretraining else layout]
    return read_index(dataset, beneath if beneath.is_dir() else root)


def choose_groups(index: DatasetIndex, wanted: str) -> tuple[str, ...]:
    """The groups that `--group` names: one, several joined by commas, or "all". Raises InputError for unknown ones."""
    known = tuple(index.split().groups)
    if wanted == "all":
        return known
    groups = tuple(wanted.split(","))
    for group in groups:
        if group not in known:
            raise InputError(f"--group {group!r}: {index.dataset} has {', '.join(known)} (or 'all')")
    return groups


def get_manifest(
    index: DatasetIndex, group: str, protocol: Protocol, changes: dict[str, Any], file: Path | None = None
) -> Manifest:
    """The episodes to ask: those of `file`, the frozen ones, or, with changes or where none are frozen, freshly drawn.

    changes: fields of EpisodeProtocol. Raises InputError for a manifest of other data.
    """
    if file is not None:
        if changes:
            raise InputError(f"--manifest {file}: its episodes are fixed; leave {', '.join(sorted(changes))} away")
        manifest = read_manifest(file)
        if manifest.group != group:
            raise InputError(f"--manifest {file}: is of group {manifest.group}; give --group {manifest.group}")
        check_matches(manifest, index)
        return manifest
    name = protocol.episodes.name
    frozen = list(FROZEN.glob(f"{index.dataset}-{group}-{name}-*.json"))
    if frozen and not changes:
        manifest = read_manifest(find_manifest(index.dataset, group, name))
        check_matches(manifest, index)
        return manifest
    return build_manifest(index, index.split(), group, episode_protocol(name, **changes))


def first_draws(manifest: Manifest, draws: int | None) -> Manifest:
    """The manifest cut to its first `draws` support draws; None keeps all. Raises InputError for fewer than one."""
    if draws is None:
        return manifest
    if draws < 1:
        raise InputError(f"--draws {draws}: ask at least one")
    kept = tuple(episode for episode in manifest.episodes if episode.seed < draws)
    return dataclasses.replace(manifest, episodes=kept)


def choose_device(device: str) -> str:
    """ "auto" is this process's GPU, or the CPU. Raises InputError for a device that is not there."""
    local = os.environ.get("LOCAL_RANK", "0")
    if device == "auto":
        return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local}"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device!r} is unknown; {near(device, ('auto', 'cpu', 'cuda'))}") from None
    if kind.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device!r} is not supported; {near(device, ('auto', 'cpu', 'cuda'))}")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: no such GPU is usable here; choose cpu")
    return device


def load_manifests(names: Sequence[Path]) -> list[Manifest]:
    """Manifests from files; without any, all frozen ones. Raises InputError for a file that is none."""
    return [read_manifest(path) for path in (names or sorted(FROZEN.glob("*.json")))]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Every run folder among `paths` and below them, sorted within each. Raises InputError where there is none."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; give run folders, or a folder above them")
        below = sorted({header.parent for header in path.rglob("header*.json") if shards_in(header.parent)})
        if not below:
            raise InputError(f"{path}: holds no run; `run` writes one")
        found |= dict.fromkeys(below)
    return list(found)
