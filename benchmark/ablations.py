"""Wrong or missing sentences and supports: does a method use them at all?"""

from __future__ import annotations

import dataclasses

import numpy as np

from fewref.episodes.draws import draw, generator
from fewref.episodes.errors import InputError, near
from fewref.episodes.manifest import Manifest
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.types import Episode, Query, SupportSet, Target

TEXT = ("right", "empty", "other")
SUPPORT = ("right", "other-category", "none")


def check_modes(text: str, support: str) -> None:
    """Raises InputError, with near names, unless both are known."""
    if text not in TEXT:
        raise InputError(f"--text {text!r} is unknown: {near(text, TEXT)}")
    if support not in SUPPORT:
        raise InputError(f"--support {support!r} is unknown: {near(support, SUPPORT)}")


def ask_with(
    mode: str, episode: Episode, query: Query, target: Target, manifest: Manifest, index: DatasetIndex
) -> Query:
    """The query with the sentence that ablation `mode` gives it; "right" returns it as it is.

    empty: "". other: a sentence about other objects of the same video; where there is none, of another video of the
    episode; where that has none, of another episode. Drawn with a generator keyed by episode and query.
    Raises InputError where the whole manifest has no other sentence.
    """
    if mode == "right":
        return query
    text = "" if mode == "empty" else _other_sentence(episode, query, target, manifest, index)
    return dataclasses.replace(query, text=text)


def _other_sentence(episode: Episode, query: Query, target: Target, manifest: Manifest, index: DatasetIndex) -> str:
    own = set(target.expression.objects)
    said = index.videos[query.clip.video].expressions
    places = (
        lambda: [item.text for item in said if own.isdisjoint(item.objects)],
        lambda: [item.text for item in episode.queries if item.clip.video != query.clip.video],
        lambda: [item.text for other in manifest.episodes for item in other.queries],
    )
    for texts in places:
        if candidates := sorted(set(texts()) - {query.text, ""}):
            return draw(generator("other-text", episode.id, query.id), candidates, 1)[0]
    raise InputError(f"--text other: manifest {manifest.hash[:12]} has no sentence but {query.text!r}")


def support_from(mode: str, episode: Episode, manifest: Manifest) -> SupportSet:
    """The support, without pixels, that ablation `mode` gives the episode; for "none" call `blank` after loading.

    other-category: that of the category that follows in the sorted list (the first after the last) and the same draw
    (`seed`; failing that, its first). Supports from a video that the episode asks about come last.
    Raises InputError where the manifest has one category.
    """
    if mode != "other-category":
        return episode.support
    asked = {query.clip.video for query in episode.queries}

    def rank(other: Episode) -> tuple:
        shared = any(shot.clip.video in asked for shot in other.support.shots)
        return shared, other.category <= episode.category, other.category, other.seed != episode.seed, other.seed

    others = [other for other in manifest.episodes if other.category != episode.category]
    if not others:
        raise InputError(f"--support other-category: manifest {manifest.hash[:12]} is all {episode.category}")
    return min(others, key=rank).support


def blank(support: SupportSet) -> SupportSet:
    """A loaded support without content: black frames, empty masks, no sentence, no category; sizes stay."""
    shots = tuple(
        dataclasses.replace(
            shot,
            expression=dataclasses.replace(shot.expression, text="", category=""),
            frames=np.zeros_like(shot.frames),
            masks=np.zeros_like(shot.masks),
        )
        for shot in support.shots
    )
    return SupportSet("", shots)
