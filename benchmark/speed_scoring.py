"""Frames per second of J and F, against a plain transcription of their definition, both in one run."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from fewref.benchmark.judge import Packed
from fewref.benchmark.metrics import f_measure, frame_scores, jaccard, radius, scores_of_counts
from fewref.episodes.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SIZES = ((480, 854), (360, 640))
TOLERANCES = (0.008, 0.010)
COLUMNS = (
    *("size", "tolerance", "radius", "run in"),
    *("definition, frames per CPU second", "this scorer", "ratio per core"),
    *("definition, frames per second", "this scorer", "ratio"),
)
Scorer = Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Timed:
    """Seconds that one pass over all frames took: on the clock, and of CPU summed over the processes; and J and F."""

    wall: float
    cpu: float
    scores: list[tuple[np.ndarray, np.ndarray]]


def scoring_table(frames: int = 192, seed: int = 0, rounds: int = 7, device: str | None = None) -> str:
    """Time J and F together; returns a Markdown table, a line for each size, tolerance and number of processes.

    frames: length of the made-up videos, at least 2; with two processes each scores half of them. rounds: how often the
    two scorers take turns; rates are those of the median round, ratios the median of the rounds' ratios. device: times
    counting there too, masks being there already. Every round's numbers must agree bit for bit. Raises InputError
    without OpenCV, RuntimeError where the scorers differ.
    """
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for height, width in SIZES:
        truth = moving_masks(frames, height, width, seed)
        pred = imperfect(truth, seed + 1)
        with two_processes(pred, truth) as both:
            ways = {"one process": ((one_process, pred, truth),) * 2, "two processes": ((both,),) * 2}
            if device is not None:
                ways[device] = (one_process, pred, truth), (on_device, *upload(pred, truth, device))
            for tolerance in TOLERANCES:
                for name, (slow, fast) in ways.items():
                    runs = (partial(*slow, definition_scores, tolerance), partial(*fast, fast_scores, tolerance))
                    cells = (f"{height}x{width}", tolerance, radius(height, width, tolerance), name)
                    lines.append("| " + " | ".join(map(str, (*cells, *_rates(runs, frames, rounds)))) + " |")
    note = (
        f"{frames} frames of masks in memory, objects of {100 * truth.mean():.0f} % of the image, median of {rounds} "
        "rounds. A CPU second is one of one core, summed over the processes; OpenCV runs on one thread per process."
    )
    from fewref.benchmark.speed_machine import machine_line  # brings PyTorch, which the processes do without

    return "\n".join([*lines, "", note, "", machine_line()])


def _rates(runs: Sequence[Callable[[], Timed]], frames: int, rounds: int) -> list[str]:
    """The last six cells of a line: both rates and their ratio by CPU time, then by the clock."""
    for run in runs:
        run()  # the first touches memory that the later ones find in place
    timed: list[list[Timed]] = []
    for _ in range(rounds):
        timed.append([run() for run in runs])
        slow, fast = (np.concatenate(run.scores, axis=1) for run in timed[-1])
        if not np.array_equal(slow, fast):
            raise RuntimeError("the scorer differs from the definition; its speed means nothing")
    cells = []
    for clock in ("cpu", "wall"):
        seconds = [[getattr(run, clock) for run in pair] for pair in timed]
        cells += [f"{frames / median(column):.0f}" for column in zip(*seconds, strict=True)]
        cells.append(f"{median(slow / fast for slow, fast in seconds):.1f}")
    return cells


def one_process(pred: np.ndarray, truth: np.ndarray, scorer: Scorer, tolerance: float) -> Timed:
    """Score all frames here."""
    wall, cpu = time.perf_counter(), time.process_time()
    scores = scorer(pred, truth, tolerance)
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, [scores])


@contextmanager
def two_processes(pred: np.ndarray, truth: np.ndarray) -> Iterator[Callable[[Scorer, float], Timed]]:
    """Two processes with half of the frames each, which score them when the function yielded is called."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for half in (slice(None, len(truth) // 2), slice(len(truth) // 2, None)):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs, pred[half], truth[half]), daemon=True))
        processes[-1].start()
        theirs.close()  # or the end of a process would not be seen here
        pipes.append(ours)

    def score(scorer: Scorer, tolerance: float) -> Timed:
        start = time.perf_counter()
        for pipe in pipes:
            pipe.send((scorer, tolerance))
        answers = [pipe.recv() for pipe in pipes]
        wall = time.perf_counter() - start
        return Timed(wall, sum(answer.cpu for answer in answers), [answer.scores[0] for answer in answers])

    try:
        yield score
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.join()


def _serve(pipe: multiprocessing.connection.Connection, pred: np.ndarray, truth: np.ndarray) -> None:
    # As the scoring processes of a run do with every query. Once a whole video was freed, the C library keeps scratch
    # memory instead of giving it back each time; a process in which this never happened scores a third slower.
    Packed.of(truth).masks()
    while True:
        try:
            scorer, tolerance = pipe.recv()
        except EOFError:
            return
        pipe.send(one_process(pred, truth, scorer, tolerance))


def upload(pred: np.ndarray, truth: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """Masks as tensors on a device."""
    import torch

    return torch.from_numpy(pred).to(device), torch.from_numpy(truth).to(device)


def on_device(pred: Tensor, truth: Tensor, scorer: Scorer, tolerance: float) -> Timed:
    """Count on the device of tensors bool (T,H,W), copy the counts back and score them; `scorer` has no say."""
    from fewref.kernels.mask_scores import frame_counts

    def score(pred: Tensor, truth: Tensor, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        counts = frame_counts(pred, truth, radius(*truth.shape[1:], tolerance))
        return scores_of_counts(counts.cpu().numpy())  # waits for the device

    return one_process(pred, truth, score, tolerance)


def fast_scores(pred: np.ndarray, truth: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """J and F, float64 (T,), as the suite scores."""
    return frame_scores(pred, truth, tolerance)[:2]


def definition_scores(pred: np.ndarray, truth: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """J and F, float64 (T,), of bool (T,H,W) masks by the definition, frame by frame on the full image.

    Boundary maps by comparison with three neighbours, dilated by OpenCV with the whole disk on one thread (spec
    scoring.md 1). Raises InputError where OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise InputError("OpenCV is not installed; pip install opencv-python-headless") from None
    cv2.setNumThreads(1)
    reach = radius(*truth.shape[1:], tolerance)
    grid = np.arange(-reach, reach + 1)
    disk = (grid[:, None] ** 2 + grid**2 <= reach * reach).astype(np.uint8)
    overlaps, counts = [], []
    for p, g in zip(pred, truth, strict=True):
        edge_p, edge_g = _boundary(p), _boundary(g)
        near_p, near_g = (cv2.dilate(edge.astype(np.uint8), disk).astype(bool) for edge in (edge_p, edge_g))
        overlaps.append((np.sum(p & g), np.sum(p | g)))
        counts.append((np.sum(edge_g), np.sum(edge_p), np.sum(edge_g & near_p), np.sum(edge_p & near_g)))
    return jaccard(*np.array(overlaps).T), f_measure(np.array(counts))


def _boundary(mask: np.ndarray) -> np.ndarray:
    right, lower, both = mask.copy(), mask.copy(), mask.copy()
    right[:, :-1] = mask[:, 1:]
    lower[:-1] = mask[1:]
    both[:-1, :-1] = mask[1:, 1:]
    edge = (mask ^ right) | (mask ^ lower) | (mask ^ both)
    edge[-1] = mask[-1] ^ right[-1]
    edge[:, -1] = mask[:, -1] ^ lower[:, -1]
    return edge


def moving_masks(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """A video of one drifting, breathing blob with a wavy outline: bool (T,H,W), about 8 % of the image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves, phases = rng.uniform(0.05, 0.12, 4), rng.uniform(0, 2 * math.pi, 4)
    masks = np.empty((frames, height, width), bool)
    for t in range(frames):
        centre_y = height * (0.5 + 0.15 * math.sin(2 * math.pi * t / 50))
        centre_x = width * (0.5 + 0.25 * math.sin(2 * math.pi * t / 70 + 1))
        angle = np.arctan2(y - centre_y, x - centre_x)
        outline = 1 + sum(w * np.cos((k + 2) * angle + phases[k] + 0.1 * t) for k, w in enumerate(waves))
        size = math.sqrt(0.08 * height * width / math.pi) * (1 + 0.1 * math.sin(t / 9))
        masks[t] = np.hypot(y - centre_y, x - centre_x) < size * outline
    return masks


def imperfect(truth: np.ndarray, seed: int) -> np.ndarray:
    """`truth` as a network would give it back: moved by a few pixels, with holes and specks. bool (T,H,W)."""
    rng = np.random.default_rng(seed)
    pred = np.empty_like(truth)
    for t, mask in enumerate(truth):
        pred[t] = np.roll(mask, tuple(rng.integers(-6, 7, 2)), (0, 1))
        rows, columns = np.nonzero(mask)
        for k in rng.integers(0, len(rows), 6):
            tall, wide = rng.integers(3, 20, 2)
            part = pred[t, rows[k] : rows[k] + tall, columns[k] : columns[k] + wide]
            np.logical_not(part, out=part)
    return pred
