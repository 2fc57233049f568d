"""Run folders written by hand (manifests from a plan, rows from a function, no pixels), and their means by loops."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fewref.benchmark.store import MANIFEST, Row
from fewref.episodes.manifest import Manifest, write_manifest
from fewref.episodes.types import Clip, Episode, Expression, Query, Shot, SupportSet, Target, canonical_json

DATASET = "mini-ref-youtube-vos"
# category -> video -> (sentences, frames)
PLAN = {
    "cat": {f"c{n}": (1 + n % 3, 2 + n) for n in range(6)},
    "dog": {f"d{n}": (2, 5 - n % 2) for n in range(5)},
    "fox": {"f0": (1, 3), "f1": (4, 9)},
}
Score = Callable[[Episode, Query], "tuple[Sequence[float], Sequence[float]] | None"]


def make_manifest(group: str = "1", plan: dict = PLAN, draws: int = 3, skip: Callable = lambda *_: False) -> Manifest:
    """Episodes of every category and draw; `skip(category, draw, video)` leaves a video out of a draw."""
    episodes = []
    for category, videos in plan.items():
        for draw in range(draws):
            shot = Shot(Clip(DATASET, f"{category}-support{draw}", ("0",)), Expression("0", "it", ("1",), category))
            queries, targets = [], []
            for video, (sentences, frames) in videos.items():
                for number in range(0 if skip(category, draw, video) else sentences):
                    said = Expression(str(number), f"{video} {number}", ("1",), category)
                    clip = Clip(DATASET, video, tuple(f"{frame:05d}" for frame in range(frames)))
                    queries.append(Query(f"{video}:{number}", clip, said.text))
                    targets.append(Target(queries[-1].id, said))
            support = SupportSet(category, (shot,))
            if queries:
                episodes.append(Episode(DATASET, group, category, draw, support, tuple(queries), tuple(targets)))
    protocol = {"name": "group", "shots": 1, "supports": draws, "support_frames": 1, "episodes": 0}
    return Manifest(DATASET, protocol, "0" * 64, tuple(episodes))


def noisy(key: str, level: float = 0.5, width: float = 0.2) -> Score:
    """Scores around a level, with an offset per video; drawn from generators keyed by their place."""

    def score(episode: Episode, query: Query) -> tuple[list[float], list[float]]:
        def rng(*parts: object) -> np.random.Generator:
            digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
            return np.random.default_rng(int.from_bytes(digest[:8], "big"))

        middle = level + width * rng("video", query.clip.video).uniform(-1, 1)
        values = middle + width * rng(key, episode.group, episode.seed, query.id).uniform(
            -1, 1, (2, len(query.clip.frames))
        )
        j, f = np.clip(values, 0, 1).tolist()
        return j, f

    return score


def write_run(
    folder: Path,
    manifest: Manifest,
    score: Score,
    method: str = "m",
    scoring: Sequence[str] = ("davis",),
    keep: int | None = None,
    costs: tuple[int, int] = (0, 0),
    **defines: object,
) -> Path:
    """A run folder whose rows have the scores of `score` (None: failed); `keep`: only the first rows of it; `costs`:
    gradient steps and trained weights."""
    settings = {
        "version": "1",
        "method": method,
        "class": "x:X",
        "sees_truth": False,
        "config": "tiny",
        "precision": "fp32",
    }
    settings |= {"window": 10, "seed": 0, "device": "cpu", "checkpoint_sha256": None, "parameters": 1500000}
    settings |= {"dataset": manifest.dataset, "group": manifest.group, "metadata_hash": manifest.metadata_hash}
    settings |= {"manifest_hash": manifest.hash, "episodes": manifest.protocol, "scoring": list(scoring)}
    settings |= {"text": "right", "support": "right", "extras": {}, **defines}
    run = hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:12]
    environment = {"git": {"sha": "abc0" * 10, "dirty": False}, "libraries": {"torch": "2.9"}, "device": "x86"}
    environment |= {"kernels": "pytorch", "peak_memory": "of the process"}
    rows = [
        make_row(run, method, episode, query, score(episode, query), scoring, costs)
        for episode in manifest.episodes
        for query in episode.queries
    ]
    folder.mkdir(parents=True)
    (folder / "header.json").write_text(json.dumps({"run": run, "defines": settings, "environment": environment}))
    (folder / "rows.jsonl").write_text("".join(canonical_json(dataclasses.asdict(row)) + "\n" for row in rows[:keep]))
    write_manifest(folder / MANIFEST, manifest)
    return folder


def make_row(
    run: str, method: str, episode: Episode, query: Query, values, scoring: Sequence[str], costs: tuple[int, int]
) -> Row:
    """One row; 20 s to adapt, half a second per frame to predict."""
    entry = {"size": [4, 5], "radius": 1, "resized": False, "inter": 2, "union": 8}
    scores = {name: {"j": list(values[0]), "f": list(values[1]), **entry} for name in scoring} if values else {}
    frames = len(query.clip.frames)
    return Row(
        run=run,
        episode=episode.id,
        group=episode.group,
        category=episode.category,
        seed=episode.seed,
        query=query.id,
        video=query.clip.video,
        method=method,
        status="ok" if values else "failed",
        error="" if values else "ValueError: no",
        frames=frames,
        window=10,
        confidence=0.5,
        scores=scores,
        seconds_adapt=20.0 if values else 0.0,
        seconds_predict=0.5 * frames if values else 0.0,
        peak_bytes=3 << 20,
        adapt_steps=costs[0],
        adapt_trained=costs[1],
    )


def per_draw(rows, scoring: str, repeats: dict | None = None) -> dict[int, np.ndarray]:
    """draw -> (J, F) of one group's rows, by plain loops; `repeats`: how often a (category, video) counts."""
    slots = defaultdict(lambda: defaultdict(list))
    for row in rows:
        zeros = [0.0] * row.frames
        j, f = (row.scores[scoring][name] if row.status == "ok" else zeros for name in "jf")
        for _ in range(repeats[row.category, row.video] if repeats else 1):
            if scoring == "davis":
                slots[row.seed][row.category].append((sum(j) / len(j), sum(f) / len(f)))
            else:
                slot = row.category if scoring == "danet-paper" else "all"
                slots[row.seed][slot] += zip(j, f, strict=True)
    return {draw: np.mean([np.mean(values, axis=0) for values in by.values()], axis=0) for draw, by in slots.items()}
