"""The loop: adapt once per episode, ask its queries, judge and store each answer; start it again to go on."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fewref.benchmark import ablations, provenance
from fewref.benchmark.judge import Packed, finished, judge, known_scoring, open_pool, prediction_line, settle
from fewref.benchmark.store import Key, Row, RunFolder
from fewref.episodes.errors import InputError
from fewref.episodes.load import load_query, load_support, load_truth, prefetch
from fewref.episodes.manifest import Manifest, check_matches
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.types import Episode, Prediction, Query, SupportSet, Target
from fewref.methods.adaptation.adapted import AdaptationRecord, Adapted
from fewref.methods.adaptation.restore import seed_generators
from fewref.methods.base import Method
from fewref.methods.check import prediction_fault

try:
    import resource
except ImportError:  # not on Windows, where the memory of a CPU run reads 0
    resource = None

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


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


@dataclass(frozen=True)
class Task:
    """One query with its episode; `begins`, `ends`: the first and the last of its episode that is still to be asked."""

    episode_id: str
    episode: Episode
    query: Query
    target: Target
    begins: bool = False
    ends: bool = False

    @property
    def key(self) -> Key:
        """The key of its row."""
        return self.episode_id, self.query.id


@dataclass(frozen=True)
class Loaded:
    """A task with the pixels of its query, of the support where it begins an episode, and the truth, bool (T,H,W)."""

    task: Task
    query: Query
    support: SupportSet | None
    truth: np.ndarray


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
    A query in which the method raises gives a row with status "failed" (asked again at the next start), and the run
    goes on; after out-of-memory it is asked again with half the window, which its row records.
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

    def load(task: Task) -> Loaded:
        episode = task.episode
        chosen = None
        if task.begins:
            chosen = load_support(index, ablations.support_from(support, episode, manifest))
            chosen = ablations.blank(chosen) if support == "none" else chosen
        query = ablations.ask_with(text, episode, task.query, task.target, manifest, index)
        return Loaded(task, load_query(index, query), chosen, load_truth(index, task.query, task.target))

    with RunFolder(out, header, manifest, [task.key for task in tasks], shard) as store, open_pool(workers) as pool:
        todo = mark_borders([task for task in tasks if task.key not in store.rows])
        done = len(tasks) - len(todo)
        bar = tqdm(total=len(tasks), initial=done, desc=method_name, unit="query", disable=not progress)
        asker = Asker(method, method_name, header["run"])
        with bar, ExitStack() as stack:
            stack.callback(method.forget)
            jobs = ask_all(asker, prefetch(todo, load), scoring, pool)
            for row, judged in settle(jobs, depth=2 * workers):
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


def mark_borders(tasks: Sequence[Task]) -> list[Task]:
    """The tasks, with `begins` and `ends` set where the episode is not that of the task before, or behind."""
    names = [None, *(task.episode_id for task in tasks), None]
    sides = zip(tasks, names, names[2:], strict=False)
    return [replace(task, begins=task.episode_id != last, ends=task.episode_id != after) for task, last, after in sides]


def ask_all(asker: Asker, loaded: Iterator[Loaded], scoring: list[str], pool: Executor) -> Iterator[tuple[Row, Future]]:
    """Each query's row, still without scores, with the job that judges its answer (done and None if it failed)."""
    for item in loaded:
        row, prediction = asker.ask(item)
        if prediction is None:
            yield row, finished(None)
            continue
        small = None if prediction.input_masks is None else Packed.of(prediction.input_masks)
        yield row, pool.submit(judge, scoring, Packed.of(prediction.masks), Packed.of(item.truth), small)


@dataclass
class Attempt:
    """What came of a call of the method: its result, or one line of error; seconds of the call that succeeded."""

    result: Any = None
    error: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0


class Asker:
    """Asks a method one query after the other; adapts it where an episode begins, and lets it forget at its end."""

    def __init__(self, method: Method, method_name: str, run_id: str) -> None:
        self.method, self.method_name, self.run_id = method, method_name, run_id
        self.window = method.window
        self.adapted = Attempt()

    def ask(self, item: Loaded) -> tuple[Row, Prediction | None]:
        """The query's row without scores, and the prediction; None in its place if the query failed."""
        try:
            return self._ask(item)
        finally:
            self.method.window = self.window
            if item.task.ends:
                self.method.forget()

    def _ask(self, item: Loaded) -> tuple[Row, Prediction | None]:
        task, method = item.task, self.method
        if item.support is not None:
            self.adapted = self._attempt(f"adapt/{task.episode_id}", lambda: method.adapt(item.support))

        def predict() -> Prediction:
            if method.info.sees_truth:
                method.reveal(item.truth)
            return method.predict(item.query)

        answer = Attempt(error=f"adapt: {self.adapted.error}")
        if not self.adapted.error:
            answer = self._attempt(f"predict/{task.episode_id}/{task.query.id}", predict)
        error = answer.error or prediction_fault(answer.result, item.query)
        prediction = None if error else answer.result
        record, late = AdaptationRecord(), 0.0
        if isinstance(method, Adapted):
            record, late = method.record, method.record.seconds if method.transductive and prediction else 0.0
        row = Row(
            run=self.run_id,
            episode=task.episode_id,
            group=task.episode.group,
            category=task.episode.category,
            seed=task.episode.seed,
            query=task.query.id,
            video=task.query.clip.video,
            method=self.method_name,
            status="failed" if error else "ok",
            error=error,
            frames=len(task.query.clip.frames),
            window=method.window,
            confidence=float(prediction.confidence) if prediction else 0.0,
            seconds_adapt=self.adapted.seconds + late,
            seconds_predict=answer.seconds - late,
            peak_bytes=max(self.adapted.peak_bytes, answer.peak_bytes),
            adapt_steps=record.steps,
            adapt_trained=record.trained,
        )
        return row, prediction

    def _attempt(self, key: str, call: Callable[[], Any]) -> Attempt:
        """Call with the full window, and with half of it after each out-of-memory.

        The global generators are seeded by the key, and the full window comes back for the next query: an answer
        depends neither on the queries before it nor on where a run was split or taken up.
        """
        method = self.method
        method.window = self.window
        while True:
            seed_generators(f"{method.seed}/{key}")
            _reset_peak(method.device)
            start = time.perf_counter()
            try:
                result = call()
                _synchronize(method.device)
                return Attempt(result, "", time.perf_counter() - start, _peak_bytes(method.device))
            except InputError:
                raise
            except Exception as error:  # whatever a method raises is a failed query
                if not is_out_of_memory(error):
                    return Attempt(error=describe(error))
            # Only here, outside of the handler, has the traceback let go of the tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if method.window <= 1:
                return Attempt(error="out of memory, even with a window of 1 frame")
            method.window //= 2


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that CUDA or the CPU had no memory left."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def describe(error: Exception) -> str:
    """An exception in one line: type, message, file name and line where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{message} ({Path(place.filename).name}:{place.lineno})"


def _on_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _reset_peak(device: str) -> None:
    if _on_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)


def _synchronize(device: str) -> None:
    if _on_cuda(device):
        torch.cuda.synchronize(device)


def _peak_bytes(device: str) -> int:
    """CUDA: most bytes allocated since the reset; CPU: the largest size of the process so far."""
    if _on_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
