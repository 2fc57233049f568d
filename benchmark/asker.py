"""Ask a method: the queries about one clip together where it can, again after out-of-memory, one row for each."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fewref.benchmark.store import Row
from fewref.benchmark.units import Loaded, Task
from fewref.episodes.errors import InputError
from fewref.episodes.types import Prediction, Query
from fewref.methods.adaptation.adapted import AdaptationRecord, Adapted
from fewref.methods.adaptation.restore import seed_generators
from fewref.methods.base import Method
from fewref.methods.check import prediction_fault

try:
    import resource
except ImportError:  # not on Windows, where the memory of a CPU run reads 0
    resource = None

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


@dataclass
class Attempt:
    """What came of a call of the method: its result, or one line of error; seconds of the call that succeeded."""

    result: Any = None
    error: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0


class Asker:
    """Asks a method one clip after the other; adapts it where an episode begins, and lets it forget at its end."""

    def __init__(self, method: Method, method_name: str, run_id: str) -> None:
        self.method, self.method_name, self.run_id = method, method_name, run_id
        self.window, self.batch = method.window, method.batch
        self.adapted = Attempt()

    def ask(self, item: Loaded) -> Iterator[tuple[Row, Prediction | None]]:
        """The row of each query, in order, without scores, and the prediction; None in its place if it failed."""
        try:
            if item.support is not None:
                key = f"adapt/{item.unit.episode_id}"
                self.adapted = self._attempt(key, lambda: self.method.adapt(item.support))
            answers = self._ask_together(item)
            for place, (task, query) in enumerate(zip(item.unit.tasks, item.queries, strict=True)):
                answer = answers[place] if answers else self._ask_alone(item, place)
                yield self._row(task, query, answer)
        finally:
            self.method.window, self.method.batch = self.window, self.batch
            if item.unit.ends:
                self.method.forget()

    def _ask_together(self, item: Loaded) -> list[Attempt] | None:
        """An answer to each query of a clip, its time in equal shares; None where they are to be asked one by one."""
        method, queries = self.method, item.queries
        if len(queries) == 1 or self.adapted.error or not method.shares_clips or method.info.sees_truth:
            return None

        def predict() -> list[Prediction]:
            answers = method.predict_clip(queries)
            if len(answers) != len(queries):
                raise ValueError(f"predict_clip gives {len(answers)} answers to {len(queries)} queries")
            return answers

        whole = self._attempt(f"predict/{item.unit.episode_id}/{queries[0].id}", predict)
        if whole.error:
            video = queries[0].clip.video
            tqdm.write(f"{video}: asked one by one, since together: {whole.error}", file=sys.stderr)
            return None
        return [replace(whole, result=answer, seconds=whole.seconds / len(queries)) for answer in whole.result]

    def _ask_alone(self, item: Loaded, place: int) -> Attempt:
        if self.adapted.error:
            return Attempt(error=f"adapt: {self.adapted.error}")
        method, query = self.method, item.queries[place]
        if len(item.queries) > 1:  # what a method does to its pixels shall not reach the next query
            query = replace(query, frames=query.frames.copy())

        def predict() -> Prediction:
            if method.info.sees_truth:
                method.reveal(item.truths[place])
            return method.predict(query)

        return self._attempt(f"predict/{item.unit.episode_id}/{query.id}", predict)

    def _row(self, task: Task, query: Query, answer: Attempt) -> tuple[Row, Prediction | None]:
        method = self.method
        error = answer.error or prediction_fault(answer.result, query)
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
        """Call with the full window; after out-of-memory with one window at a time, and then with half the window.

        The global generators are seeded by the key, and the full window comes back for the next call: an answer
        depends neither on the queries before it nor on where a run was split or taken up.
        """
        method = self.method
        method.window, method.batch = self.window, self.batch
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
            if method.batch > 1:
                method.batch = 1
            elif method.window > 1:
                method.window //= 2
            else:
                return Attempt(error="out of memory, even with a window of 1 frame")


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
