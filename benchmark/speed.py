"""How fast the parts of the suite are, each against a plain transcription of what it computes, in one run.

`python benchmark/speed.py scoring` prints frames per second of the scorer on one core.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from fewref.benchmark.metrics import f_measure, frame_scores, jaccard, radius
from fewref.episodes.errors import InputError

SIZES = ((480, 854), (360, 640))
TOLERANCES = (0.008, 0.010)


def scoring_table(frames: int = 96, seed: int = 0, repeats: int = 5) -> str:
    """Time J and F together and return a Markdown table, a line for each size and tolerance.

    frames: length of the made-up videos; repeats: rounds, of which the best counts, the two scorers taking turns.
    Every round's numbers must agree exactly. Raises InputError without OpenCV, RuntimeError where the scorers differ.
    """
    lines = ["| size | tolerance | radius | definition, frames/s | this scorer, frames/s | ratio |", "|" + "---|" * 6]
    for height, width in SIZES:
        truth = moving_masks(frames, height, width, seed)
        pred = imperfect(truth, seed + 1)
        for tolerance in TOLERANCES:
            slow, fast = _best_seconds((definition_scores, _scores), (pred, truth, tolerance), repeats)
            cells = (f"{height}x{width}", tolerance, radius(height, width, tolerance), f"{frames / slow:.0f}")
            lines.append("| " + " | ".join(map(str, (*cells, f"{frames / fast:.0f}", f"{slow / fast:.1f}"))) + " |")
    note = f"One core, {frames} frames of masks in memory, objects of {100 * truth.mean():.0f} % of the image"
    return "\n".join([*lines, "", f"{note}; CPU time, best of {repeats}."])


def _best_seconds(functions: Sequence[Callable], arguments: tuple, repeats: int) -> list[float]:
    best = [math.inf] * len(functions)
    for _ in range(repeats):
        results = []
        for index, function in enumerate(functions):
            start = time.process_time()
            results.append(function(*arguments))
            best[index] = min(best[index], time.process_time() - start)
        if not all(np.array_equal(one, other) for one, other in zip(results[0], results[1], strict=True)):
            raise RuntimeError("the scorer differs from the definition; its speed means nothing")
    return best


def _scores(pred: np.ndarray, truth: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and print the asked-for table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="speed.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("scoring", help="J and F against the definition with OpenCV on the full frame")
    scoring.add_argument("--frames", type=int, default=96)
    scoring.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.frames < 1:
        parser.error("--frames must be at least 1")
    try:
        print(scoring_table(options.frames, options.seed))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
