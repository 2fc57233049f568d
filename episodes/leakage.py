"""Proof that a manifest is fair: nothing of a query is shown before it is asked, neither in support nor in training.

Source: `specs/protocol.md` section 8 (leak check).
"""

from __future__ import annotations

from collections import Counter, defaultdict

from fewref.episodes.manifest import Manifest, check_matches
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.sampler import training_pools
from fewref.episodes.types import Episode
from fewref.splits import Split, base_categories, complete, novel_categories


def check(manifest: Manifest, split: Split, index: DatasetIndex | None = None) -> list[str]:
    """All leaks and inconsistencies of a manifest, a line each; none for a fair one.

    With `assignment: last_expression` queries about objects of other categories belong to the protocol: `notes` counts
    them. With an index, categories and texts are held against the dataset and the videos against the training samples.
    Raises InputError where the manifest is not of this dataset, or its group unknown.
    """
    split = complete(split, index.categories() if index else ())
    novel = novel_categories(split, manifest.group)
    problems: list[str] = []
    for episode in manifest.episodes:
        problems += [f"episode {episode.id} ({episode.category}): {fault}" for fault in _episode_faults(episode)]
        problems += [f"episode {episode.id}: {fault}" for fault in _category_faults(manifest, episode, novel)]
    if manifest.protocol["name"] == "group":
        problems += _draw_faults(manifest)
    if index:
        check_matches(manifest, index)
        problems += _index_faults(manifest, index)
        problems += _training_faults(manifest, split, index)
    return list(dict.fromkeys(problems))


def notes(manifest: Manifest, split: Split, index: DatasetIndex | None = None) -> list[str]:
    """What is allowed but should be known, a line each: the manifest's own notes and counts of mixed videos."""
    said = list(manifest.notes)
    pairs = [(episode, target) for episode in manifest.episodes for target in episode.targets]
    foreign = {(e.category, t.query) for e, t in pairs if t.expression.category != e.category}
    if foreign:
        said.append(f"{len(foreign)} queries are about objects of another category (assignment by last expression)")
    if index:
        split = complete(split, index.categories())
        base = base_categories(split, manifest.group)
        mixed = [e for v in _test_videos(manifest) for e in index.videos[v].expressions if e.category in base]
        if mixed:
            said.append(
                f"{len(mixed)} expressions of base categories lie in support or query videos, about objects of "
                "different categories; training leaves these videos out"
            )
    return said


def _test_videos(manifest: Manifest) -> list[str]:
    shown = {shot.clip.video for episode in manifest.episodes for shot in episode.support.shots}
    asked = {query.clip.video for episode in manifest.episodes for query in episode.queries}
    return sorted(shown | asked)


def _episode_faults(episode: Episode) -> list[str]:
    faults = []
    shown = [shot.clip.video for shot in episode.support.shots]
    asked = {query.clip.video for query in episode.queries}
    faults += [f"video {video} is both support and query" for video in sorted(asked & set(shown))]
    tracks = {(shot.clip.video, item) for shot in episode.support.shots for item in shot.expression.objects}
    clips = {query.id: query.clip.video for query in episode.queries}
    wanted = {(clips[t.query], item) for t in episode.targets if t.query in clips for item in t.expression.objects}
    faults += [
        f"object track {item} of video {video} is both support and query" for video, item in sorted(tracks & wanted)
    ]
    faults += [f"video {video} is support {n} times" for video, n in sorted(Counter(shown).items()) if n > 1]
    ids = Counter(query.id for query in episode.queries)
    faults += [f"query {name} is asked {n} times" for name, n in sorted(ids.items()) if n > 1]
    if [target.query for target in episode.targets] != [query.id for query in episode.queries]:
        faults.append("targets are not those of the queries, in their order")
    faults += [] if shown else ["no support"]
    faults += [] if ids else ["no query"]
    return faults


def _category_faults(manifest: Manifest, episode: Episode, novel: tuple[str, ...]) -> list[str]:
    """novel: the group's test categories; empty (nothing is known of the categories) checks agreement only."""
    faults = []
    if novel and episode.category not in novel:
        faults.append(f"category {episode.category} is not novel in group {manifest.group}")
    for shot in episode.support.shots:
        if shot.expression.category != episode.category:
            faults.append(f"support video {shot.clip.video} shows {shot.expression.category}, not {episode.category}")
    if manifest.protocol["assignment"] == "object":
        for target in episode.targets:
            found = target.expression.category
            if found != episode.category:
                kind = "base" if novel and found not in novel else "other"
                faults.append(f"query {target.query} is about {kind} category {found}, not {episode.category}")
    return faults


def _draw_faults(manifest: Manifest) -> list[str]:
    """The draws of a category ask the same queries, and none asks about a support video of any."""
    draws: dict[str, list[Episode]] = defaultdict(list)
    for episode in manifest.episodes:
        draws[episode.category].append(episode)
    faults = []
    for category, episodes in draws.items():
        if any(episode.queries != episodes[0].queries for episode in episodes):
            faults.append(f"{category}: its draws do not ask the same queries")
        shown = {shot.clip.video for episode in episodes for shot in episode.support.shots}
        asked = {query.clip.video for episode in episodes for query in episode.queries}
        faults += [
            f"{category}: video {video} is support of one draw, query of another" for video in sorted(shown & asked)
        ]
    return faults


def _index_faults(manifest: Manifest, index: DatasetIndex) -> list[str]:
    """Every expression, its objects' categories and every frame are as the dataset has them."""
    faults = []
    for episode in manifest.episodes:
        clips = {query.id: query.clip for query in episode.queries}
        used = [(shot.clip, shot.expression) for shot in episode.support.shots]
        used += [(clips[target.query], target.expression) for target in episode.targets if target.query in clips]
        for clip, expression in used:
            video = index.videos.get(clip.video)
            if video is None:
                faults.append(f"video {clip.video} is not in the dataset")
            elif expression not in video.expressions:
                faults.append(f"expression {expression.id} of video {clip.video} is not as in the dataset")
            elif not set(clip.frames) <= set(video.frames):
                faults.append(f"clip of video {clip.video} has frames that are not in the dataset")
    return faults


def _training_faults(manifest: Manifest, split: Split, index: DatasetIndex) -> list[str]:
    """No training sample of the group lies in a support or query video."""
    if not base_categories(split, manifest.group):
        return []
    pools = training_pools(index, split, manifest.group)
    trained = {video for samples in pools.values() for video, _ in samples}
    return [f"video {video} is trained on and tested" for video in _test_videos(manifest) if video in trained]
