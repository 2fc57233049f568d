"""One episode in words, for `episodes show ID`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from fewref.episodes.errors import InputError
from fewref.episodes.manifest import Manifest
from fewref.episodes.types import Episode, Expression


def find_episode(manifests: Iterable[Manifest], identifier: str) -> Episode:
    """The episode whose id begins with `identifier`. Raises InputError where none does, or several do."""
    episodes = {episode.id: episode for manifest in manifests for episode in manifest.episodes}
    found = [name for name in sorted(episodes) if identifier and name.startswith(identifier)]
    if not found:
        hint = f"the first are {', '.join(list(episodes)[:3])}" if episodes else "there are no episodes"
        raise InputError(f"no episode {identifier!r} ({hint}); name its manifest, or build one with `episodes build`")
    if len(found) > 1:
        raise InputError(f"episode {identifier!r} could be any of {', '.join(found[:5])}; give more digits")
    return episodes[found[0]]


def episode_text(episode: Episode) -> str:
    """Several lines: what the episode is, each support shot, and per query video its sentences."""
    shots, queries = episode.support.shots, episode.queries
    videos = len({query.clip.video for query in queries})
    lines = [
        f"episode {episode.id}: {episode.category}, {episode.dataset}, group {episode.group}, draw {episode.seed}",
        f"support: {_count(len(shots), 'clip')}",
    ]
    for number, shot in enumerate(shots, start=1):
        lines.append(f"  {number}. video {shot.clip.video}, {_frames(shot.clip.frames)}")
        lines.append(f"     {_meant(shot.expression, episode.category)}")
    lines.append(f"queries: {_count(len(queries), 'expression')} in {_count(videos, 'video')}")
    pairs = zip(queries, episode.targets, strict=True)
    for clip, asked in groupby(pairs, key=lambda pair: pair[0].clip):
        targets = [target for _, target in asked]
        lines.append(f"  video {clip.video}, {_frames(clip.frames)}, {_count(len(targets), 'expression')}")
        lines += [f"     {_meant(target.expression, episode.category)}" for target in targets]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _frames(names: tuple[str, ...]) -> str:
    if len(names) <= 5:
        return f"{'frame' if len(names) == 1 else 'frames'} {' '.join(names)}"
    return f"{len(names)} frames {names[0]}..{names[-1]}"


def _meant(expression: Expression, category: str) -> str:
    objects = f"{'object' if len(expression.objects) == 1 else 'objects'} {', '.join(expression.objects) or 'none'}"
    other = "" if expression.category == category else f" ({expression.category})"
    return f'{expression.id}: {objects}{other} "{expression.text}"'
