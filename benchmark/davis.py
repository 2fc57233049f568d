"""The DAVIS evaluation of whole label maps, and the merge that turns one mask per object into label maps.

Used for Ref-DAVIS17, whose scripts score each annotator's merged result in the unsupervised way. NumPy and SciPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from fewref.benchmark.metrics import DAVIS_TOLERANCE, frame_scores
from fewref.benchmark.scoring import sequence_statistics
from fewref.episodes.errors import InputError, near

VOID = 255
MOST_PROPOSALS = 20
BACKGROUND_SCORE = 0.1
TASKS = ("semi-supervised", "unsupervised", "identity")


@dataclass(frozen=True)
class DavisResult:
    """Mean, recall and decay of J and F per object, and over objects.

    objects: `<sequence>_<k>`, k counting the rows of a sequence from 1; j, f: (mean, recall, decay) in that order.
    """

    objects: tuple[str, ...]
    j: tuple[tuple[float, float, float], ...]
    f: tuple[tuple[float, float, float], ...]

    @property
    def total(self) -> dict[str, float]:
        """Plain means over objects, under the names of the official table."""
        j, f = np.mean(self.j, axis=0), np.mean(self.f, axis=0)
        row = {"J&F-Mean": float(j[0] + f[0]) / 2}
        for letter, values in (("J", j), ("F", f)):
            row |= {f"{letter}-{name}": float(x) for name, x in zip(("Mean", "Recall", "Decay"), values, strict=True)}
        return row


def davis_evaluation(gt: Mapping[str, np.ndarray], pred: Mapping[str, np.ndarray], task: str) -> DavisResult:
    """Score label maps of several sequences.

    gt, pred: sequence name to (T,H,W) integer labels, 0 background; 255 in gt is void. Objects are 1 to the largest
    label of the first frame of gt. task: "semi-supervised" drops the first and last frame and takes void as background;
    "unsupervised" keeps all frames, leaves void out and gives each object the predicted label that suits best overall;
    "identity" does the same with every label meaning itself. Sequences are scored in the order of gt.
    Raises InputError for an unknown task, missing or extra sequences, unlike shapes or too many predicted labels.
    Source: davis2017-evaluation, spec scoring.md 2.1, 2.2 and 4.
    """
    if task not in TASKS:
        raise InputError(f"unknown DAVIS task {task!r}; {near(task, TASKS)}")
    if set(gt) != set(pred):
        wrong = sorted(set(gt) ^ set(pred))[0]
        raise InputError(f"sequence {wrong} has {'no result' if wrong in gt else 'no ground truth'}")
    objects, j, f = [], [], []
    for name in gt:
        scores = _sequence_scores(name, np.asarray(gt[name]), np.asarray(pred[name]), task)
        for k, (per_frame_j, per_frame_f) in enumerate(scores, 1):
            objects.append(f"{name}_{k}")
            j.append(sequence_statistics(per_frame_j))
            f.append(sequence_statistics(per_frame_f))
    if not objects:
        raise InputError("no sequence shows an object in its first frame; check the ground-truth label maps")
    return DavisResult(tuple(objects), tuple(j), tuple(f))


def _sequence_scores(name: str, gt: np.ndarray, pred: np.ndarray, task: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(J, F) per frame, float64 (t,) each, of the objects of one sequence."""
    if gt.ndim != 3 or gt.shape != pred.shape:
        raise InputError(f"sequence {name}: result {pred.shape} and ground truth {gt.shape} differ in shape")
    void = gt == VOID
    gt = np.where(void, 0, gt)
    count = int(gt[0].max())
    if task == "semi-supervised":
        if len(gt) < 3:
            raise InputError(f"sequence {name}: {len(gt)} frames; without the first and the last none is left to score")
        gt, pred, void = gt[1:-1], pred[1:-1], None
    labels = int(pred.max())
    most = MOST_PROPOSALS if task == "unsupervised" else count
    if labels > most:
        raise InputError(f"sequence {name}: the result has label {labels} but {most} is the largest allowed")
    if task != "unsupervised":
        return [frame_scores(pred == k, gt == k, DAVIS_TOLERANCE, void)[:2] for k in range(1, count + 1)]
    return _matched_scores(gt, pred, void, count, max(labels, count))


def _matched_scores(
    gt: np.ndarray, pred: np.ndarray, void: np.ndarray, objects: int, labels: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best one-to-one assignment of labels to objects by the sum of (mean J + mean F) / 2.

    Rows come in the order of the labels, as upstream's: a swap of two labels shows in no number but their order.
    """
    pairs = [
        [frame_scores(pred == label, gt == k, DAVIS_TOLERANCE, void)[:2] for k in range(1, objects + 1)]
        for label in range(1, labels + 1)
    ]
    worth = np.array([[(j.mean() + f.mean()) / 2 for j, f in row] for row in pairs]).reshape(labels, objects)
    return [pairs[label][k] for label, k in zip(*linear_sum_assignment(worth, maximize=True), strict=True)]


def refdavis_merge(logits: np.ndarray) -> np.ndarray:
    """One label map from the mask logits of the objects of a video.

    logits: float32 (K,T,H,W) at the original size. Returns uint8 (T,H,W), 0 background, k the k-th object. A score
    below 0.5 counts as 0, the background as 0.1; equal scores go to the lower label. Raises ValueError for another
    shape or more than 254 objects. Source: spec scoring.md 4.
    """
    import torch

    if logits.ndim != 4 or len(logits) > 254:
        raise ValueError(f"expected logits (K, T, H, W) of at most 254 objects, got {logits.shape}")
    # Sigmoids saturate, so ties depend on the very function: PyTorch's, in float32.
    scores = torch.sigmoid(torch.from_numpy(np.ascontiguousarray(logits, np.float32))).numpy()
    background = np.full((1, *scores.shape[1:]), BACKGROUND_SCORE, np.float32)
    return np.concatenate([background, np.where(scores < 0.5, 0, scores)]).argmax(axis=0).astype(np.uint8)
