"""What a run asks: the queries of each episode, those about one clip together, and their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewref.benchmark import ablations
from fewref.benchmark.store import Key
from fewref.episodes.errors import InputError
from fewref.episodes.load import load_queries, load_support, load_truths
from fewref.episodes.manifest import Manifest
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.types import Clip, Episode, Query, SupportSet, Target


@dataclass(frozen=True)
class Task:
    """One query with its episode, without pixels."""

    episode_id: str
    episode: Episode
    query: Query
    target: Target

    @property
    def key(self) -> Key:
        """The key of its row."""
        return self.episode_id, self.query.id


@dataclass(frozen=True)
class Unit:
    """Queries of one episode about the same frames; `begins`, `ends`: the first and the last unit of its episode."""

    tasks: tuple[Task, ...]
    begins: bool = False
    ends: bool = False

    @property
    def episode_id(self) -> str:
        """The id of the episode that all of its queries are of."""
        return self.tasks[0].episode_id


@dataclass(frozen=True)
class Loaded:
    """A unit with pixels: its queries, which share one array of frames, the support where it begins an episode, and
    the truth of each query, bool (T,H,W), one array for all that mean the same objects."""

    unit: Unit
    queries: tuple[Query, ...]
    support: SupportSet | None
    truths: tuple[np.ndarray, ...]


def tasks_of(manifest: Manifest, shard: tuple[int, int] = (0, 1)) -> list[Task]:
    """Every query of a shard's episodes, in the order of the manifest. Raises InputError for one asked twice."""
    tasks: dict[Key, Task] = {}
    for episode in manifest.episodes[shard[0] :: shard[1]]:
        name = episode.id
        for query, target in zip(episode.queries, episode.targets, strict=True):
            task = Task(name, episode, query, target)
            if task.key in tasks:
                raise InputError(f"manifest {manifest.hash[:12]}: query {query.id} of episode {name} is there twice")
            tasks[task.key] = task
    return list(tasks.values())


def units_of(tasks: Sequence[Task]) -> list[Unit]:
    """The tasks grouped by episode and clip, in the order in which each clip is asked about first."""
    grouped: dict[tuple[str, Clip], list[Task]] = {}
    for task in tasks:
        grouped.setdefault((task.episode_id, task.query.clip), []).append(task)
    names = [None, *(name for name, _ in grouped), None]
    sides = zip(grouped.values(), names, names[1:], names[2:], strict=False)
    return [Unit(tuple(group), own != before, own != after) for group, before, own, after in sides]


def load_unit(unit: Unit, manifest: Manifest, index: DatasetIndex, text: str, support: str) -> Loaded:
    """Decode a unit. text, support: see `ablations`. Raises InputError for bad data."""
    chosen, episode = None, unit.tasks[0].episode
    if unit.begins:
        chosen = load_support(index, ablations.support_from(support, episode, manifest))
        chosen = ablations.blank(chosen) if support == "none" else chosen
    asked = [ablations.ask_with(text, episode, task.query, task.target, manifest, index) for task in unit.tasks]
    truths = load_truths(index, [task.query for task in unit.tasks], [task.target for task in unit.tasks])
    return Loaded(unit, load_queries(index, asked), chosen, truths)
