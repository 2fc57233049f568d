"""The types that flow through the suite: frozen dataclasses, JSON in and out.

Pixels are NumPy arrays and are filled in only by `fewref.episodes.load`; everything else is metadata.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Clip:
    """An ordered list of annotated frames of one video; no pixels."""

    dataset: str
    video: str
    frames: tuple[str, ...]


@dataclass(frozen=True)
class Expression:
    """A sentence about one or (Mini-MeViS) several objects of a video, all of one category."""

    id: str
    text: str
    objects: tuple[str, ...]
    category: str


@dataclass(frozen=True)
class Shot:
    """One annotated support example: a clip with a sentence and, after load, its pixels.

    frames: uint8 (T,3,H,W) RGB; masks: bool (T,H,W), the union of the expression's objects. Both None before load.
    """

    clip: Clip
    expression: Expression
    frames: np.ndarray | None = field(default=None, compare=False, repr=False)
    masks: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SupportSet:
    """The K annotated shots of one category that a method may adapt to."""

    category: str
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Query:
    """One question: segment what `text` names in every frame of `clip`. There is no mask inside.

    id: unique within its episode (`<video>:<expression id>`); frames: uint8 (T,3,H,W) RGB after load, None before.
    """

    id: str
    clip: Clip
    text: str
    frames: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Target:
    """What the scorer, and nobody else, knows of a query: which objects are meant."""

    query: str
    expression: Expression


@dataclass(frozen=True)
class Episode:
    """One category, one support set, the queries asked under it and, apart from them, the objects they mean.

    group: "1".."4", or "all" for datasets without groups. seed: index of the support draw. id: hash of the content.
    """

    dataset: str
    group: str
    category: str
    seed: int
    support: SupportSet
    queries: tuple[Query, ...]
    targets: tuple[Target, ...]

    @cached_property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of the episode's canonical JSON."""
        return hashlib.sha256(canonical_json(to_json(self)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Prediction:
    """A method's answer: masks bool (T,H,W) at the query's original size, confidence in [0,1] (higher is surer).

    input_masks: bool (T,h,w), the same answer cut at the network's input size, which the `cma-paper` scoring protocol
    judges; None where a method has no such thing.
    """

    query: str
    masks: np.ndarray
    confidence: float = 1.0
    input_masks: np.ndarray | None = None


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no blanks, non-ASCII text kept: equal values give equal text on every machine."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def to_json(episode: Episode) -> dict:
    """An episode as plain JSON values, without pixels."""

    def clip(item: Clip) -> dict:
        return {"dataset": item.dataset, "video": item.video, "frames": list(item.frames)}

    def expression(item: Expression) -> dict:
        return {"id": item.id, "text": item.text, "objects": list(item.objects), "category": item.category}

    shots = [{"clip": clip(s.clip), "expression": expression(s.expression)} for s in episode.support.shots]
    return {
        "dataset": episode.dataset,
        "group": episode.group,
        "category": episode.category,
        "seed": episode.seed,
        "support": {"category": episode.support.category, "shots": shots},
        "queries": [{"id": q.id, "clip": clip(q.clip), "text": q.text} for q in episode.queries],
        "targets": [{"query": t.query, "expression": expression(t.expression)} for t in episode.targets],
    }


def from_json(value: dict) -> Episode:
    """The inverse of `to_json`. Raises KeyError or TypeError where a field is missing or unknown."""

    def clip(item: dict) -> Clip:
        return Clip(item["dataset"], item["video"], tuple(item["frames"]))

    def expression(item: dict) -> Expression:
        return Expression(item["id"], item["text"], tuple(item["objects"]), item["category"])

    shots = tuple(Shot(clip(s["clip"]), expression(s["expression"])) for s in value["support"]["shots"])
    return Episode(
        dataset=value["dataset"],
        group=value["group"],
        category=value["category"],
        seed=value["seed"],
        support=SupportSet(value["support"]["category"], shots),
        queries=tuple(Query(q["id"], clip(q["clip"]), q["text"]) for q in value["queries"]),
        targets=tuple(Target(t["query"], expression(t["expression"])) for t in value["targets"]),
    )
