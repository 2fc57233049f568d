"""From masks to scores, beside the network: in a pool of processes that need no PyTorch, or from stored predictions."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from fewref.benchmark.metrics import radius
from fewref.benchmark.scoring import check_shapes, get_scoring, score_query
from fewref.benchmark.store import encode_masks
from fewref.episodes.errors import InputError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Packed:
    """Bool masks at one bit per pixel, small enough to send to another process."""

    bits: bytes
    shape: tuple[int, ...]

    @classmethod
    def of(cls, masks: np.ndarray) -> Packed:
        """Pack a bool array of any shape."""
        return cls(np.packbits(masks).tobytes(), masks.shape)

    def masks(self) -> np.ndarray:
        """The bool array again."""
        count = int(np.prod(self.shape))
        return np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=count).view(bool).reshape(self.shape)


@dataclass(frozen=True)
class Judged:
    """Scores as `Row.scores` has them, and the masks as COCO RLE lists (`input_masks` None where there are none)."""

    scores: dict[str, dict[str, Any]]
    masks: list[dict[str, Any]]
    input_masks: list[dict[str, Any]] | None


def judge(
    scoring: Sequence[str],
    masks: Packed,
    truth: Packed,
    input_masks: Packed | None = None,
    counts: Mapping[str, np.ndarray] | None = None,
) -> Judged:
    """Score one query under every named protocol and encode its masks.

    masks, truth: (T,H,W); input_masks: (T,h,w); counts: what `device_counts` made of them, for any of the protocols.
    Raises InputError where a protocol cannot judge these masks.
    """
    answer, given = masks.masks(), truth.masks()
    small = None if input_masks is None else input_masks.masks()
    scores = {}
    for name in scoring:
        score = score_query(get_scoring(name), answer, given, small, (counts or {}).get(name))
        scores[name] = {
            "j": [float(value) for value in score.j],
            "f": [float(value) for value in score.f],
            "size": [int(score.height), int(score.width)],
            "radius": int(score.radius),
            "resized": bool(score.resized),
            "inter": int(score.intersection),
            "union": int(score.union),
        }
    return Judged(scores, encode_masks(answer), None if small is None else encode_masks(small))


def device_counts(scoring: Sequence[str], masks: np.ndarray, truth: np.ndarray, device: str) -> dict[str, np.ndarray]:
    """The integers behind J and F, counted on a device, by protocol: int64 (T,6), for `judge`.

    masks, truth: (T,H,W), nonzero is foreground. Covers the protocols that judge at the original size. The others
    resize first, and are left to the scoring processes: where a resized mask meets the threshold, devices may round to
    either side, and no score should depend on the device. Raises InputError where the shapes differ.
    """
    import torch

    from fewref.kernels.mask_scores import frame_counts

    check_shapes(masks.shape, truth.shape)
    protocols = [protocol for protocol in map(get_scoring, scoring) if protocol.resolution == "original"]
    radii = {protocol.name: radius(*truth.shape[1:], protocol.tolerance) for protocol in protocols}
    if not radii:
        return {}
    # PyTorch takes neither negative strides nor, without a warning, arrays that are read-only.
    pred, gt = (torch.from_numpy(np.require(item, requirements="CW")).to(device) for item in (masks, truth))
    made = {reach: frame_counts(pred, gt, reach).cpu().numpy() for reach in sorted(set(radii.values()))}
    return {name: made[reach] for name, reach in radii.items()}


def known_scoring(scoring: Sequence[str]) -> list[str]:
    """The names, once each, in the order given. Raises InputError for an unknown one or none."""
    if not scoring:
        raise InputError("no scoring protocol is named; the usual one is 'davis'")
    return [get_scoring(name).name for name in dict.fromkeys(scoring)]


class InProcess(Executor):
    """Does each job at once, in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        """The finished job."""
        return finished(fn(*args, **kwargs))


def finished(result: Any) -> Future:
    """A job that is done."""
    future: Future = Future()
    future.set_result(result)
    return future


@contextmanager
def open_pool(workers: int) -> Iterator[Executor]:
    """Scoring processes (0: none, score in this process); begun jobs end, others are dropped when the block is left."""
    if workers == 0:
        yield InProcess()
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_follow_parent)
    try:
        for _ in range(workers):
            pool.submit(_begin)
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Nothing: a process that is to find this has imported what it needs, before the first answer waits for it."""


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def settle(jobs: Iterable[tuple[Item, Future]], depth: int) -> Iterator[tuple[Item, Any]]:
    """(item, result) of every job, in order, each as soon as it is done; at most `depth` jobs are waited for behind.

    Where the source of jobs ends in an InputError, the results so far come first. Raises InputError if a process died.
    """
    waiting: deque[tuple[Item, Future]] = deque()

    def first() -> tuple[Item, Any]:
        item, future = waiting.popleft()
        try:
            return item, future.result()
        except BrokenProcessPool:
            raise InputError("a scoring process died (out of memory?); start again with --workers 0") from None

    try:
        for job in jobs:
            waiting.append(job)
            while waiting and (len(waiting) > depth or waiting[0][1].done()):
                yield first()
    except InputError:
        while waiting:
            yield first()
        raise
    while waiting:
        yield first()


def prediction_line(episode: str, query: str, judged: Judged) -> dict[str, Any]:
    """One line of the prediction store."""
    line = asdict(judged)
    del line["scores"]
    return {"episode": episode, "query": query, **{name: value for name, value in line.items() if value is not None}}
