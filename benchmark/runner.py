"""The loop: adapt once per episode, ask its queries, judge and store each answer; start it again to go on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fewref.benchmark import ablations, provenance
from fewref.benchmark.asker import Asker
from fewref.benchmark.judge import (
    Packed,
    device_counts,
    finished,
    judge,
    known_scoring,
    open_pool,
    prediction_line,
    settle,
)
from fewref.benchmark.store import Row, RunFolder
from fewref.benchmark.units import Loaded, Unit, load_unit, tasks_of, units_of
from fewref.episodes.errors import InputError
from fewref.episodes.load import prefetch
from fewref.episodes.manifest import Manifest, check_matches
from fewref.episodes.readers import DatasetIndex
from fewref.methods.base import Method


@dataclass(frozen=True)
class RunResult:
    """rows: of this shard, in the manifest's order; failed: how many of them have status "failed"."""

    folder: Path
    rows: list[Row]
    failed: int

    @property
    def exit_code(self) -> int:
        """0, or 3 where queries failed."""
        return 3 if self.failed else 0


def run(
    *,
    method: Method,
    method_name: str,
    manifest: Manifest,
    index: DatasetIndex,
    out: Path,
    scoring: Sequence[str] = ("davis",),
    extras: dict[str, Any] | None = None,
    text: str = "right",
    support: str = "right",
    shard: tuple[int, int] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> RunResult:
    """Ask a method everything that a manifest asks, or, in a folder that was begun, what is left of it.

    out: run folder. scoring: names of scoring protocols. extras: defining values for the header. text, support: see
    `ablations`. shard: (index from 0, count) takes every count-th episode; None follows torchrun, or takes all.
    workers: processes that score; 0 scores between the queries.
    Queries of an episode about one clip are decoded together, and asked together where the method `shares_clips`; rows
    do not depend on it. A query in which the method raises gives a row with status "failed" (asked again at the next
    start), and the run goes on; after out-of-memory it is asked again with one window at a time, and then with half the
    window, which its row records.
    Raises InputError for bad data, a folder of another run and unknown names; what is finished by then stays.
    """
    ablations.check_modes(text, support)
    scoring = known_scoring(scoring)
    check_matches(manifest, index)
    shard = shard_of_process(shard)
    tasks = tasks_of(manifest, shard)
    header = provenance.header(
        method=method,
        method_name=method_name,
        manifest=manifest,
        scoring=scoring,
        text=text,
        support=support,
        extras=extras,
    )

    def load(unit: Unit) -> Loaded:
        return load_unit(unit, manifest, index, text, support)

    with RunFolder(out, header, manifest, [task.key for task in tasks], shard) as store, open_pool(workers) as pool:
        units = units_of([task for task in tasks if task.key not in store.rows])
        largest, done = max((len(unit.tasks) for unit in units), default=0), len(store.rows)
        bar = tqdm(total=len(tasks), initial=done, desc=method_name, unit="query", disable=not progress)
        asker = Asker(method, method_name, header["run"])
        with bar, ExitStack() as stack:
            stack.callback(method.forget)
            jobs = ask_all(asker, prefetch(units, load), scoring, pool)
            # A clip's answers come at once: all of them may wait while the next clip is asked about.
            for row, judged in settle(jobs, depth=workers and 2 * workers + largest):
                if judged is None:
                    store.append(row, None)
                    tqdm.write(f"{row.query}: failed, {row.error}", file=sys.stderr)
                else:
                    line = prediction_line(row.episode, row.query, judged)
                    store.append(replace(row, scores=judged.scores), line)
                bar.update()
        rows = store.finish()
    return RunResult(Path(out), rows, sum(row.status == "failed" for row in rows))


def shard_of_process(shard: tuple[int, int] | None) -> tuple[int, int]:
    """The shard given, or that of torchrun's RANK and WORLD_SIZE, or (0, 1). Raises InputError for an absurd one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if shard is None:
        shard = (int(os.environ.get("RANK", "0")), world)
    elif world > 1:
        raise InputError("--shard and torchrun both split the episodes; use one of them")
    if not 0 <= shard[0] < shard[1]:
        raise InputError(f"--shard {shard[0]}/{shard[1]}: the first number goes from 0 to {shard[1] - 1}")
    return shard


def ask_all(asker: Asker, loaded: Iterator[Loaded], scoring: list[str], pool: Executor) -> Iterator[tuple[Row, Future]]:
    """Each query's row, still without scores, with the job that judges its answer (done and None if it failed)."""
    for item in loaded:
        for (row, prediction), truth in zip(asker.ask(item), item.truths, strict=True):
            if prediction is None:
                yield row, finished(None)
                continue
            small = None if prediction.input_masks is None else Packed.of(prediction.input_masks)
            masks = Packed.of(prediction.masks), Packed.of(truth), small
            counts = counted(scoring, prediction.masks, truth, asker.method.device)
            yield row, pool.submit(judge, scoring, *masks, counts)


def counted(scoring: list[str], masks: np.ndarray, truth: np.ndarray, device: str) -> dict[str, np.ndarray] | None:
    """What a GPU counts for the scores; None on a CPU, and where the GPU has no memory left. Scorers count the same."""
    if torch.device(device).type != "cuda":
        return None
    try:
        return device_counts(scoring, masks, truth, device)
    except torch.cuda.OutOfMemoryError:
        return None
