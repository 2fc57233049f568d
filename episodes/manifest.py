"""A frozen list of episodes: written once, named by its hash, kept with the results.

On disk expressions and query lists are stored once and referred to, so that five draws over the same queries cost
little more than one. The hash covers the canonical JSON of everything but itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fewref.episodes.errors import InputError, read_json, write_atomic
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.types import Clip, Episode, Expression, Query, Shot, SupportSet, Target, canonical_json

FORMAT = "fewref-manifest"
VERSION = 1
FROZEN = Path(__file__).resolve().parent / "manifests"


@dataclass(frozen=True)
class Manifest:
    """Episodes of one group with all that identifies them.

    protocol: the fields of the `EpisodeProtocol` that made them. metadata_hash: of the index they were drawn from.
    notes: one line per category that was left out or whose draws share support videos.
    """

    dataset: str
    protocol: dict[str, Any]
    metadata_hash: str
    episodes: tuple[Episode, ...]
    notes: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """The group of its episodes."""
        return self.episodes[0].group

    @cached_property
    def hash(self) -> str:
        """SHA-256, 64 hex digits, of the canonical content."""
        return _digest(_pack(self))

    @property
    def file_name(self) -> str:
        """`<dataset>-<group>-<protocol>-<first 12 digits of the hash>.json`."""
        return f"{self.dataset}-{self.group}-{self.protocol['name']}-{self.hash[:12]}.json"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest, one line per top-level entry; the same manifest gives the same bytes. Raises InputError."""
    packed = {**_pack(manifest), "sha256": manifest.hash}
    lines = (f"{canonical_json(key)}:{canonical_json(packed[key])}" for key in sorted(packed))
    write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and verify its hash. Raises InputError for a file that is not one, is newer, or was changed."""
    packed = read_json(path)
    if not isinstance(packed, dict) or packed.get("format") != FORMAT:
        raise InputError(f"{path}: not a manifest of episodes; make one with `episodes build`")
    if packed.get("version") != VERSION:
        found = packed.get("version")
        raise InputError(f"{path}: manifest version {found!r}, but this program reads {VERSION}; update the program")
    stated = packed.pop("sha256", None)
    if stated != _digest(packed):
        raise InputError(f"{path}: content does not match its sha256, it was edited or damaged; build it again")
    try:
        return _unpack(packed)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: malformed manifest ({error!r}); build or fetch it again") from None


def check_matches(manifest: Manifest, index: DatasetIndex) -> None:
    """Raises InputError unless the manifest was drawn from this dataset with this very metadata."""
    if manifest.dataset != index.dataset:
        raise InputError(f"manifest {manifest.hash[:12]} is of {manifest.dataset}, but {index.root} is {index.dataset}")
    if manifest.metadata_hash != index.metadata_hash():
        raise InputError(
            f"{index.root}: its metadata is not that of manifest {manifest.hash[:12]} ({manifest.dataset}); "
            "use the release it was made from, or build a manifest of this one with `episodes build`"
        )


def find_manifest(dataset: str, group: str, protocol: str, folder: Path = FROZEN) -> Path:
    """The one frozen manifest of a dataset, group and protocol name. Raises InputError if none or several are there."""
    found = sorted(folder.glob(f"{dataset}-{group}-{protocol}-{'[0-9a-f]' * 12}.json"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder}: several manifests of {dataset}, group {group}, {protocol} ({names}); name one")
    raise InputError(f"no frozen manifest of {dataset}, group {group}, {protocol}; make one with `episodes build`")


def _digest(packed: dict) -> str:
    return hashlib.sha256(canonical_json(packed).encode()).hexdigest()


class _Table:
    """Values numbered in order of first use."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, value: Any) -> int:
        if value not in self._numbers:
            self._numbers[value] = len(self.values)
            self.values.append(value)
        return self._numbers[value]


def _pack(manifest: Manifest) -> dict:
    """Plain JSON values. Tables: `frames` (lists), `videos` ([video, frames number]), `expressions`, `questions`."""
    frames, videos, expressions, questions = _Table(), _Table(), _Table(), _Table()

    def pack_clip(clip: Clip) -> int:
        if clip.dataset != manifest.dataset:
            raise ValueError(f"clip of {clip.dataset} in a manifest of {manifest.dataset}")
        return videos.number((clip.video, frames.number(clip.frames)))

    def pack_expression(item: Expression) -> int:
        return expressions.number((item.id, item.text, item.objects, item.category))

    def pack_question(query: Query, target: Target) -> tuple[int, int]:
        item = target.expression
        if (query.id, query.id, query.text) != (target.query, f"{query.clip.video}:{item.id}", item.text):
            raise ValueError(f"query {query.id}: its id or text is not that of its target")
        return pack_clip(query.clip), pack_expression(item)

    episodes = []
    for episode in manifest.episodes:
        if (episode.dataset, episode.group, episode.support.category) != (
            manifest.dataset,
            manifest.group,
            episode.category,
        ):
            raise ValueError(f"episode {episode.id} is not of {manifest.dataset}, group {manifest.group}")
        pairs = zip(episode.queries, episode.targets, strict=True)
        asked = questions.number(tuple(pack_question(query, target) for query, target in pairs))
        shots = [[pack_clip(shot.clip), pack_expression(shot.expression)] for shot in episode.support.shots]
        episodes.append({"category": episode.category, "seed": episode.seed, "support": shots, "questions": asked})
    return {
        "format": FORMAT,
        "version": VERSION,
        "dataset": manifest.dataset,
        "group": manifest.group,
        "protocol": manifest.protocol,
        "metadata_hash": manifest.metadata_hash,
        "notes": list(manifest.notes),
        "frames": frames.values,
        "videos": videos.values,
        "expressions": expressions.values,
        "questions": questions.values,
        "episodes": episodes,
    }


def _unpack(packed: dict) -> Manifest:
    dataset, group = packed["dataset"], packed["group"]
    frames = [tuple(names) for names in packed["frames"]]
    clips = [Clip(dataset, video, frames[number]) for video, number in packed["videos"]]
    expressions = [
        Expression(i, text, tuple(objects), category) for i, text, objects, category in packed["expressions"]
    ]

    def questions(asked: list) -> tuple[tuple[Query, ...], tuple[Target, ...]]:
        pairs = [(clips[clip], expressions[expression]) for clip, expression in asked]
        queries = tuple(Query(f"{clip.video}:{item.id}", clip, item.text) for clip, item in pairs)
        return queries, tuple(Target(q.id, item) for q, (_, item) in zip(queries, pairs, strict=True))

    asked = [questions(item) for item in packed["questions"]]
    episodes = []
    for item in packed["episodes"]:
        shots = tuple(Shot(clips[clip], expressions[expression]) for clip, expression in item["support"])
        support = SupportSet(item["category"], shots)
        episodes.append(Episode(dataset, group, item["category"], item["seed"], support, *asked[item["questions"]]))
    notes = tuple(packed["notes"])
    return Manifest(dataset, packed["protocol"], packed["metadata_hash"], tuple(episodes), notes)
