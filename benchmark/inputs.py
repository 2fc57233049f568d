"""What a command is given: dataset folders, groups, episodes, devices and run folders, found and checked."""

from __future__ import annotations

import dataclasses
import json
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
from fewref.episodes.types import Episode
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
        try:
            if pretraining:
                write_synthetic(root, videos_per_category=PRETRAIN_VIDEOS, layouts=("pretrain",))
            else:
                write_synthetic(root)
        except InputError:
            if not root.exists():  # else another process, as of torchrun, was faster and wrote the same
                raise
    beneath = root / FOLDERS["pretrain" if pretraining else layout]
    return read_index(dataset, beneath if beneath.is_dir() else root)


def named_values(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """Values of a repeated option NAME=VALUE, in JSON or a bare word. Raises InputError for what is neither, and for a
    name twice."""
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        bare = value.isidentifier() and value not in ("true", "false", "null")
        try:
            parsed = value if bare else json.loads(value)
        except ValueError:
            raise InputError(
                f"{option} {text}: give NAME=VALUE with the value in JSON or a word, such as steps=20"
            ) from None
        if name in values:
            raise InputError(f"{option} {text}: {name} is given twice")
        values[name] = parsed
    return values


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
    changes = {key: value for key, value in changes.items() if getattr(protocol.episodes, key, None) != value}
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


def fewer_queries(manifest: Manifest, queries: int | None) -> Manifest:
    """The manifest with at most that many queries per episode, evenly spaced over its list, and a note; None keeps all.

    Episodes that ask the same queries still do. Raises InputError for fewer than one.
    """
    if queries is None:
        return manifest
    if queries < 1:
        raise InputError(f"--queries {queries}: ask at least one")
    most = max(len(episode.queries) for episode in manifest.episodes)
    if queries >= most:
        return manifest
    note = f"at most {queries} queries of each episode are asked, evenly spaced, of up to {most}"
    kept = tuple(_spaced(episode, queries) for episode in manifest.episodes)
    return dataclasses.replace(manifest, episodes=kept, notes=(*manifest.notes, note))


def _spaced(episode: Episode, count: int) -> Episode:
    n = len(episode.queries)
    places = [i * n // count for i in range(count)] if count < n else range(n)
    queries, targets = (tuple(items[place] for place in places) for items in (episode.queries, episode.targets))
    return dataclasses.replace(episode, queries=queries, targets=targets)


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
