"""An index of a dataset becomes a list of episodes: explicit generators over sorted lists, metadata only.

Source: `specs/protocol.md` sections 3.1 (frame window), 3.4 (upstream's test set) and 8 (the reproducible protocol).
Every draw has a generator of its own, keyed by what is drawn, so that a further category or draw shifts no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np

from fewref.episodes.draws import draw, generator
from fewref.episodes.errors import InputError, near
from fewref.episodes.manifest import Manifest
from fewref.episodes.metadata import Video
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.types import Clip, Episode, Expression, Query, Shot, SupportSet, Target
from fewref.splits import Split, base_categories, complete, novel_categories

ASSIGNMENTS = ("object", "last_expression")
RANDOM_TRIES = 200
Samples = Sequence[tuple[str, Expression]]
Pool = dict[str, tuple[tuple[str, Expression], ...]]
Choices = dict[str, list[tuple[Expression, int]]]


@dataclass(frozen=True)
class EpisodeProtocol:
    """Which questions are asked.

    name: "group" (S support draws per category, every draw averaged over the same queries), "random" (one-query
    episodes) or "cma-paper" (upstream's lists: the rest of the videos is asked under one support clip).
    shots: K support videos per draw. supports: S draws per category; for "random" the number of seeds.
    support_frames: annotated frames per support clip. episodes: per seed, "random" only. seed: shifts all draws.
    assignment: a sample belongs to the category of its "object", or with its whole video to that of the video's
    "last_expression" (upstream).
    """

    name: str = "group"
    shots: int = 1
    supports: int = 5
    support_frames: int = 5
    episodes: int = 0
    seed: int = 0
    assignment: str = "object"


PROTOCOLS = {
    "group": EpisodeProtocol("group"),
    "random": EpisodeProtocol("random", episodes=1000),
    "cma-paper": EpisodeProtocol("cma-paper", supports=1, assignment="last_expression"),
}
VerifyMasks = Callable[[Shot], bool]


def episode_protocol(name: str, **changes: object) -> EpisodeProtocol:
    """A named protocol with some fields changed. Raises InputError for an unknown name or a value out of range."""
    if name not in PROTOCOLS:
        raise InputError(f"unknown episode protocol {name!r}: {near(name, PROTOCOLS)}")
    protocol = replace(PROTOCOLS[name], **changes)
    _check_protocol(protocol)
    return protocol


def _check_protocol(protocol: EpisodeProtocol) -> None:
    if protocol.name not in PROTOCOLS:
        raise InputError(f"unknown episode protocol {protocol.name!r}: {near(protocol.name, PROTOCOLS)}")
    if protocol.assignment not in ASSIGNMENTS:
        raise InputError(f"unknown assignment {protocol.assignment!r}: {near(protocol.assignment, ASSIGNMENTS)}")
    least = {"shots": 1, "supports": 1, "support_frames": 1, "seed": 0, "episodes": int(protocol.name == "random")}
    for name, low in least.items():
        if getattr(protocol, name) < low:
            raise InputError(f"episode protocol {protocol.name}: {name} must be at least {low}")


def window(frame_count: int, wanted: int, drawn: int) -> list[int]:
    """Frame positions of a clip of `wanted` frames, given one drawn position (protocol.md 3.1).

    The window ends at the drawn position, or is the first one where that would begin before the video; a video with
    fewer frames is taken whole and its last frame repeated. wanted = 1 gives the drawn frame.
    Raises ValueError if `drawn` is outside the video or `wanted` is below 1.
    """
    if not 0 <= drawn < frame_count or wanted < 1:
        raise ValueError(f"window({frame_count}, {wanted}, {drawn}): position outside the video, or no frame wanted")
    if wanted == 1:
        return [drawn]
    if wanted > frame_count:
        return list(range(frame_count)) + [frame_count - 1] * (wanted - frame_count)
    first = max(0, drawn - wanted + 1)
    return list(range(first, first + wanted))


@lru_cache(maxsize=4096)
def _middles(frame_count: int, wanted: int) -> tuple[int, ...]:
    """For every drawn position, the position of the middle frame of its window."""
    return tuple(window(frame_count, wanted, k)[wanted // 2] for k in range(frame_count))


def support_choices(video: Video, expressions: Iterable[Expression], wanted: int) -> list[tuple[Expression, int]]:
    """All (expression, drawn position) whose clip shows an object meant in its middle frame, in order.

    A uniform draw among them is the draw of protocol.md 3.1 and 3.2 with redraws until the object is visible.
    """
    choices = []
    for expression in expressions:
        seen = {frame for item in expression.objects for frame in video.visible.get(item, video.frames)}
        middles = enumerate(_middles(len(video.frames), wanted))
        choices += [(expression, k) for k, middle in middles if video.frames[middle] in seen]
    return choices


def sample_episodes(
    index: DatasetIndex,
    split: Split,
    group: str,
    protocol: EpisodeProtocol,
    verify_masks: VerifyMasks | None = None,
) -> list[Episode]:
    """The episodes of one group, categories in the split's order, then draws.

    verify_masks: given a shot without pixels, says whether its masks truly show the object (where images are at hand);
    a shot that fails is drawn again. Raises InputError where no category can be asked.
    """
    return list(build_manifest(index, split, group, protocol, verify_masks).episodes)


def build_manifest(
    index: DatasetIndex,
    split: Split,
    group: str,
    protocol: EpisodeProtocol,
    verify_masks: VerifyMasks | None = None,
) -> Manifest:
    """`sample_episodes` with everything that identifies them; `notes` names each category left out, and why.

    Raises InputError for an unknown group, a dataset other than the split's, or when nothing can be asked.
    """
    _check_protocol(protocol)
    novel = novel_categories(complete(split, index.categories()), group)
    if index.dataset != split.dataset:
        raise InputError(f"{index.root} was read as {index.dataset}, but the split is that of {split.dataset}")
    draws = _Draws(index, group, protocol, verify_masks)
    pool = category_pool(index, novel, protocol.assignment)
    if protocol.name == "random":
        parts = [_random_episodes(draws, pool)]
    else:
        parts = [_category_episodes(draws, category, samples) for category, samples in pool.items()]
    episodes = tuple(episode for made, _ in parts for episode in made)
    notes = tuple(note for _, said in parts for note in said)
    if not episodes:
        raise InputError(f"{index.root}: no episode for group {group} ({notes[0]}); ask for fewer shots")
    return Manifest(index.dataset, asdict(protocol), index.metadata_hash(), episodes, notes)


def category_pool(index: DatasetIndex, categories: Sequence[str], assignment: str = "object") -> Pool:
    """category -> its (video, expression) samples, videos and expressions sorted; every category has an entry.

    With "last_expression" a video's samples all go to the category of its last expression, as upstream has it.
    """
    pool: dict[str, list[tuple[str, Expression]]] = {category: [] for category in categories}
    for name in sorted(index.videos):
        expressions = index.videos[name].expressions
        for expression in expressions:
            owner = expression if assignment == "object" else expressions[-1]
            if owner.category in pool:
                pool[owner.category].append((name, expression))
    return {category: tuple(samples) for category, samples in pool.items()}


def training_pools(index: DatasetIndex, split: Split, group: str) -> Pool:
    """Base category -> its training samples (video, expression), categories in the split's order, samples sorted.

    Objects are assigned, not videos; a video in which any expression names a novel object is left out whole
    (protocol.md section 8). Raises InputError where the group leaves no base category.
    """
    base = base_categories(split, group)
    if not base:
        raise InputError(f"{split.dataset}: group {group} leaves no base category to train on; it is for testing only")
    novel = novel_categories(split, group)
    clean = {n: v for n, v in index.videos.items() if not any(e.category in novel for e in v.expressions)}
    return category_pool(replace(index, videos=clean), base)


@dataclass(frozen=True)
class _Draws:
    """What the draws of one manifest have in common."""

    index: DatasetIndex
    group: str
    protocol: EpisodeProtocol
    verify_masks: VerifyMasks | None

    def rng(self, category: str, *number: int) -> np.random.Generator:
        p = self.protocol
        return generator(self.index.dataset, self.group, category, p.name, p.seed, *number)

    def choices(self, category: str, samples: Samples) -> Choices:
        """Video -> its possible shots, for each video of the samples; none where no object of the category is shown."""
        own: dict[str, list[Expression]] = {video: [] for video, _ in samples}
        for video, expression in samples:
            own[video] += [expression] if expression.category == category else []
        frames = self.protocol.support_frames
        return {video: support_choices(self.index.videos[video], own[video], frames) for video in own}

    def shots(self, rng: np.random.Generator, videos: Sequence[str], choices: Choices, count: int) -> list[Shot]:
        """Up to `count` shots of distinct videos; fewer where `verify_masks` refuses the rest."""
        found: list[Shot] = []
        left = list(videos)
        while left and len(found) < count:
            video = draw(rng, left, 1)[0]
            left.remove(video)
            found += self._shot(rng, video, choices[video])
        return found

    def _shot(self, rng: np.random.Generator, video: str, choices: Sequence[tuple[Expression, int]]) -> list[Shot]:
        frames, left = self.index.videos[video].frames, list(choices)
        while left:
            expression, drawn = left.pop(int(rng.integers(len(left))))
            names = tuple(frames[k] for k in window(len(frames), self.protocol.support_frames, drawn))
            shot = Shot(Clip(self.index.dataset, video, names), expression)
            if self.verify_masks is None or self.verify_masks(shot):
                return [shot]
        return []

    def episode(self, category: str, seed: int, shots: list[Shot], asked: Samples) -> Episode:
        queries, targets = [], []
        for video, expression in asked:
            name = f"{video}:{expression.id}"
            clip = Clip(self.index.dataset, video, self.index.videos[video].frames)
            queries.append(Query(name, clip, expression.text))
            targets.append(Target(name, expression))
        support = SupportSet(category, tuple(shots))
        return Episode(self.index.dataset, self.group, category, seed, support, tuple(queries), tuple(targets))


def _category_episodes(draws: _Draws, category: str, samples: Samples) -> tuple[list[Episode], list[str]]:
    """S episodes of one category. Under "group" all ask the same queries: no draw's support video is asked by any."""
    shots, supports = draws.protocol.shots, draws.protocol.supports
    same_queries = draws.protocol.name == "group"
    choices = draws.choices(category, samples)
    shown = [video for video in choices if choices[video]]
    wanted = shots * supports if same_queries else shots
    budget = min(wanted, len(shown), len(choices) - 1)
    if budget < wanted:  # draws must share videos: then at least half of them are left to be asked, where that can be
        budget = min(budget, max(shots, len(choices) // 2))
    if budget < shots:
        return [], [_too_few(category, len(choices), len(shown), shots)]
    support: list[list[Shot]] = []
    used: list[str] = []
    for number in range(supports):
        rng = draws.rng(category, number)
        fresh = [video for video in shown if video not in used]
        found = draws.shots(rng, fresh, choices, min(shots, budget - len(used)))
        found += draws.shots(rng, sorted(used), choices, shots - len(found))
        if len(found) < shots:
            return [], [f"{category}: left out, too few videos whose masks show the object for {shots} support videos"]
        support.append(found)
        used = sorted({*used, *(shot.clip.video for shot in found)}) if same_queries else []
    episodes = []
    for number, found in enumerate(support):
        closed = set(used) if same_queries else {shot.clip.video for shot in found}
        asked = [sample for sample in samples if sample[0] not in closed]
        episodes.append(draws.episode(category, number, found, asked))
    shared = same_queries and len(used) < wanted
    note = f"{category}: draws share support videos, {len(choices)} are too few for {wanted} distinct ones and queries"
    return episodes, [note] if shared else []


def _too_few(category: str, videos: int, shown: int, shots: int) -> str:
    needed = f"needed are {shots} for support and one for queries"
    return f"{category}: left out, videos: {videos}, of which fit for support: {shown}; {needed}"


def _random_episodes(draws: _Draws, pool: Pool) -> tuple[list[Episode], list[str]]:
    """Per seed N distinct episodes of one query: category uniform, query uniform, support from the other videos."""
    shots, count = draws.protocol.shots, draws.protocol.episodes
    choices = {category: draws.choices(category, samples) for category, samples in pool.items()}
    shown = {category: [video for video in found if found[video]] for category, found in choices.items()}
    asked = {c: [s for s in pool[c] if len(shown[c]) - (s[0] in shown[c]) >= shots] for c in pool}
    categories = [category for category in pool if asked[category]]
    notes = [_too_few(c, len(choices[c]), len(shown[c]), shots) for c in pool if not asked[c]]
    episodes: dict[str, Episode] = {}
    for seed in range(draws.protocol.supports if categories else 0):
        for number in range(count):
            rng = draws.rng("*", seed, number)
            for _ in range(RANDOM_TRIES):
                category = draw(rng, categories, 1)[0]
                query = draw(rng, asked[category], 1)[0]
                others = [video for video in shown[category] if video != query[0]]
                found = draws.shots(rng, others, choices[category], shots)
                episode = draws.episode(category, seed, found, [query])
                if len(found) == shots and episode.id not in episodes:
                    episodes[episode.id] = episode
                    break
            else:
                raise InputError(
                    f"{draws.index.root}: group {draws.group} has too few samples for {count} distinct random episodes "
                    f"of {shots} shots (episode {number} of seed {seed} not found); ask for fewer"
                )
    return list(episodes.values()), notes
