"""How time and memory grow: with processes, with the length of the clip, with supports, with videos and episodes."""

from __future__ import annotations

import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fewref.benchmark.inputs import fewer_queries
from fewref.benchmark.runner import run
from fewref.benchmark.speed_machine import forget_peak, machine_line, peak_bytes
from fewref.episodes.draws import generator
from fewref.episodes.manifest import Manifest, read_manifest, write_manifest
from fewref.episodes.readers import DatasetIndex, read_index
from fewref.episodes.sampler import build_manifest, episode_protocol
from fewref.episodes.synthetic import write_synthetic
from fewref.episodes.types import SupportSet
from fewref.methods.check import make_case
from fewref.methods.cma.adapter import CMA
from fewref.methods.shipped import find_weights
from fewref.splits import load_split

SIZE = (96, 128)  # frames of the built-in data
WINDOW, SUPPORT_FRAMES = 10, 5
MANY_VIDEOS = 1668  # of Mini-Ref-YouTube-VOS as published
_STATE: dict[str, Any] = {}  # of a child process: its method


@dataclass(frozen=True)
class Sizes:
    """How much is measured. rounds: of which the median counts; warm: runs before them that do not."""

    videos: int
    queries: int
    lengths: tuple[int, ...]
    shots: tuple[int, ...]
    many: int
    episodes: tuple[int, ...]
    rounds: int
    warm: int = 1


FULL = Sizes(4, 4, (10, 36, 150), (1, 5, 10), MANY_VIDEOS, (10, 100, 1000, 10000), 3)
QUICK = Sizes(2, 1, (10, 20), (1, 2), 96, (10, 20), 1, warm=0)


def scale_table(quick: bool = False) -> str:
    """Four Markdown tables: processes, length of the clip, number of shots, and episodes drawn from metadata.

    The network is the tiny CMA with its shipped weights. quick: small sizes and one round, to see that all works.
    """
    sizes = QUICK if quick else FULL
    with _children(2) as pool:
        parts = [processes_table(sizes, pool)]
        if quick:
            parts += growth_tables(sizes, lambda *call: pool.submit(*call).result())
    if not quick:
        parts += growth_tables(sizes, _in_new_child)
    return "\n\n".join([*parts, metadata_table(sizes), machine_line()])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table, its cells turned into text."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# Queries per second, with one process and with two


def processes_table(sizes: Sizes, pool: ProcessPoolExecutor) -> str:
    """The runner over built-in episodes: one process with all threads, and two with half of them and half the episodes.

    pool: of two processes. Loading is not counted; scoring is done by the processes that predict. Raises RuntimeError
    where a query fails.
    """
    threads = max(1, torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        root, manifest = Path(folder) / "data", Path(folder) / "manifest.json"
        write_synthetic(root, videos_per_category=sizes.videos, layouts=("youtube",), workers=1)
        write_manifest(manifest, _builtin_episodes(read_index("builtin", root), sizes.queries))
        found: dict[int, list[tuple[float, int, float]]] = {1: [], 2: []}
        for number in range(sizes.warm + sizes.rounds):
            for world in (2, 1):
                out = Path(folder) / f"run-{number}-{world}"
                jobs = [(root, manifest, out, (rank, world), max(1, threads // world)) for rank in range(world)]
                found[world].append(_joined(list(pool.map(_run_shard, jobs))))
    rates = {world: median(n / seconds for seconds, n, _ in rounds[sizes.warm :]) for world, rounds in found.items()}
    rows = [
        (world, max(1, threads // world), found[world][0][1], f"{rates[world]:.1f}", f"{rates[world] / rates[1]:.2f}")
        + (f"{100 * found[world][0][2]:.4f}",)
        for world in found
    ]
    return markdown(("processes", "threads each", "queries", "queries/s", "ratio", "J&F"), rows)


def _builtin_episodes(index: DatasetIndex, queries: int) -> Manifest:
    protocol = episode_protocol("group", supports=1)
    return fewer_queries(build_manifest(index, index.split(), "1", protocol), queries)


def _run_shard(job: tuple[Path, Path, Path, tuple[int, int], int]) -> tuple[float, float, list[float]]:
    """Run a shard in this process; returns when it began and ended, by the machine's clock, and J&F of its queries."""
    root, manifest, out, shard, threads = job
    if not _STATE:
        _STATE.update(method=_cma(), index=read_index("builtin", root), manifest=read_manifest(manifest))
    torch.set_num_threads(threads)
    start = time.monotonic()
    result = run(**_STATE, method_name="cma", out=out, shard=shard, workers=0, progress=False)
    end = time.monotonic()
    if result.failed:
        raise RuntimeError(next(row.error for row in result.rows if row.error))
    return start, end, [sum(row.means("davis")) / 2 for row in result.rows]


def _joined(shares: Sequence[tuple[float, float, list[float]]]) -> tuple[float, int, float]:
    """Seconds from the first beginning to the last end, number of queries, and their mean J&F."""
    starts, ends, scores = zip(*shares, strict=True)
    every = [score for part in scores for score in part]
    return max(ends) - min(starts), len(every), sum(every) / len(every)


def _cma() -> CMA:
    return CMA(weights=find_weights("cma", None, "tiny", "builtin", "1"), window=WINDOW)


# One episode, ever longer clips and ever more shots


@dataclass(frozen=True)
class Growth:
    """What one clip took: seconds of `adapt` and of `predict`, bytes of memory above what the loaded method holds."""

    adapt: float
    predict: float
    peak: int


def growth_tables(sizes: Sizes, call: Callable[..., Any]) -> list[str]:
    """Time and memory of one episode against the length of the query clip, and against the shots of its support.

    call: calls a function with arguments, best in a process of its own, since an allocator keeps what it has.
    """
    lengths = [(length, 1) for length in sizes.lengths]
    shots = [(sizes.lengths[0], count) for count in sizes.shots]
    found = {case: call(measure_growth, *case, sizes.rounds) for case in dict.fromkeys(lengths + shots)}
    first = found[lengths[0]]
    by_length = [
        (length, f"{1000 * item.predict:.0f}", f"{1000 * item.predict / length:.1f}")
        + (f"{item.predict / length / (first.predict / lengths[0][0]):.2f}",)
        + (f"{item.peak / 1e6:.0f}", f"{item.peak / first.peak:.2f}")
        for length, item in ((length, found[length, 1]) for length in sizes.lengths)
    ]
    one = found[shots[0]]
    by_shots = [
        (count, f"{1000 * item.adapt:.0f}", f"{item.adapt / one.adapt:.2f}", f"{1000 * item.predict:.0f}")
        + (f"{item.predict / one.predict:.2f}", f"{item.peak / 1e6:.0f}", f"{item.peak / one.peak:.2f}")
        for count, item in ((count, found[sizes.lengths[0], count]) for count in sizes.shots)
    ]
    growth = ("peak memory, MB", "ratio")
    return [
        markdown(("frames of the clip", "predict, ms", "ms/frame", "ratio", *growth), by_length),
        markdown(("shots", "adapt, ms", "ratio", "predict, ms", "ratio", *growth), by_shots),
    ]


def measure_growth(length: int, shots: int, rounds: int) -> Growth:
    """Adapt to clips of five frames and predict one clip of `length`, frames 96x128, windows of ten frames."""
    method = _cma()
    cases = [make_case(number, "dog", SIZE, SUPPORT_FRAMES) for number in range(shots)]
    support = SupportSet("dog", tuple(case.support.shots[0] for case in cases))
    query = make_case(0, "dog", SIZE, length).query
    method.adapt(SupportSet("dog", support.shots[:1]))
    method.predict(replace(query, frames=query.frames[:1]))  # loads what is loaded late
    held = forget_peak()
    method.predict(replace(query, frames=query.frames[:WINDOW]))
    forget_peak()
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        marks = [time.perf_counter()]
        method.adapt(support)
        marks.append(time.perf_counter())
        method.predict(query)
        marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    adapt, predict = (median(column) for column in zip(*times, strict=True))
    return Growth(adapt, predict, max(1, peak_bytes() - held))  # freed memory of before may do for all of it


def _children(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def _in_new_child(*call: Any) -> Any:
    with _children(1) as pool:
        return pool.submit(*call).result()


# The index and manifest side: metadata alone


def metadata_table(sizes: Sizes) -> str:
    """Seconds to read an index of many videos, and to draw, write and read back manifests of ever more episodes."""
    with tempfile.TemporaryDirectory() as folder:
        root, file = Path(folder) / "data", Path(folder) / "manifest.json"
        write_metadata(root, sizes.many)
        reading, index = _timed(lambda: read_index("mini-ref-youtube-vos", root), sizes.rounds)
        rows, first = [], 0.0
        for episodes in (None, *sizes.episodes):
            changes = {} if episodes is None else {"supports": 1, "episodes": episodes}
            protocol = episode_protocol("random" if episodes else "group", **changes)
            build, manifest = _timed(lambda p=protocol: build_manifest(index, index.split(), "1", p), sizes.rounds)
            write, _ = _timed(lambda m=manifest: write_manifest(file, replace(m)), sizes.rounds)  # a copy is unhashed
            back, again = _timed(lambda: read_manifest(file), sizes.rounds)
            if again != manifest:
                raise RuntimeError("a manifest was not read as it was written")
            first = first or build + write
            count, size = len(manifest.episodes), file.stat().st_size
            row = (protocol.name, count, f"{build:.3f}", f"{write:.3f}", f"{back:.3f}", f"{build + write:.3f}")
            rows.append((*row, f"{(build + write) / first:.1f}", f"{size / 1e6:.2f}"))
    columns = ("protocol", "episodes", "draw, s", "write, s", "read and verify, s", "draw + write, s", "ratio", "MB")
    said = f"{len(index.videos)} videos, {sum(len(v.expressions) for v in index.videos.values())} sentences: "
    return f"{said}index read in {reading:.3f} s.\n\n{markdown(columns, rows)}"


def _timed(call: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Median of the seconds that a call takes, without those of collecting garbage, and what it gives."""
    seconds = []
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            found = call()
            seconds.append(time.perf_counter() - start)
        finally:
            gc.enable()
    return median(seconds), found


def write_metadata(root: Path, videos: int, seed: int = 0) -> None:
    """The two files of the YouTube layout for made-up videos of 20 to 36 frames, two objects and four sentences."""
    rng = generator(seed, "metadata", videos)
    categories = list(load_split("mini-ref-youtube-vos").categories)
    objects, spoken = {}, {}
    for number in range(videos):
        frames = [f"{5 * t:05d}" for t in range(int(rng.integers(20, 37)))]
        first, other = categories[number % len(categories)], categories[int(rng.integers(len(categories)))]
        shown = {"1": {"category": first, "frames": frames}, "2": {"category": other, "frames": frames[3:]}}
        texts = [f"the {(first, other)[k % 2]} that is number {k} from the left" for k in range(4)]
        sentences = {str(k): {"exp": text, "obj_id": str(k % 2 + 1)} for k, text in enumerate(texts)}
        objects[f"{number:08x}"] = {"objects": shown}
        spoken[f"{number:08x}"] = {"frames": frames, "expressions": sentences}
    files = {"train/meta.json": objects, "meta_expressions/train/meta_expressions.json": spoken}
    for name, entries in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"videos": entries}), encoding="utf-8")
