"""Region similarity J and contour accuracy F of mask sequences, bit-equal to davis2017-evaluation.

Any nonzero value is foreground. The same two functions serve the few-shot repository's convention (hengliusky/
Few_shot_RVOS), which differs by its tolerance of 0.010 only. NumPy only, so that scoring processes start quickly.
"""

from __future__ import annotations

import math

import numpy as np

from fewref.kernels.packed_bits import frame_counts

DAVIS_TOLERANCE = 0.008


def region_similarity(pred: np.ndarray, gt: np.ndarray, void: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union per frame, 1 where both masks are empty.

    pred, gt, void: (T,H,W), any dtype, nonzero is foreground; void pixels count nowhere. Returns float64 (T,) in [0,1].
    Raises ValueError where the shapes differ or are not three-dimensional. Source: spec scoring.md 1.1.
    """
    pred, gt = _as_masks(pred, gt, void)
    inter = np.array([np.count_nonzero(p & g) for p, g in zip(pred, gt, strict=True)], np.int64)
    union = np.array([np.count_nonzero(p | g) for p, g in zip(pred, gt, strict=True)], np.int64)
    return jaccard(inter, union)


def contour_accuracy(
    pred: np.ndarray, gt: np.ndarray, tolerance: float = DAVIS_TOLERANCE, void: np.ndarray | None = None
) -> np.ndarray:
    """F-measure of the boundary pixels per frame; a pixel counts as right within `tolerance` of the image diagonal.

    pred, gt, void: (T,H,W), any dtype, nonzero is foreground; void pixels are cleared from both before the boundary is
    drawn. tolerance: share of the diagonal, or from 1 on a radius in whole pixels. Returns float64 (T,) in [0,1].
    Raises ValueError for unlike shapes or a senseless tolerance. Source: spec scoring.md 1.2-1.4.
    """
    return frame_scores(pred, gt, tolerance, void)[1]


def frame_scores(
    pred: np.ndarray, gt: np.ndarray, tolerance: float = DAVIS_TOLERANCE, void: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """J, F and the integers behind them, in one pass.

    Arguments as for `contour_accuracy`. Returns float64 (T,), float64 (T,) and int64 (T,6): intersection, union,
    boundary pixels of gt, of pred, matched boundary pixels of gt, of pred.
    """
    pred, gt = _as_masks(pred, gt, void)
    counts = frame_counts(pred, gt, radius(*gt.shape[1:], tolerance))
    return *scores_of_counts(counts), counts


def scores_of_counts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J and F, float64 (T,) each, from the integers int64 (T,6) that `frame_scores` describes."""
    return jaccard(counts[:, 0], counts[:, 1]), f_measure(counts[:, 2:])


def boundary_counts(
    pred: np.ndarray, gt: np.ndarray, tolerance: float = DAVIS_TOLERANCE, void: np.ndarray | None = None
) -> np.ndarray:
    """int64 (T,4): boundary pixels of gt, of pred, matched ones of gt, of pred. Arguments as for `contour_accuracy`."""
    return frame_scores(pred, gt, tolerance, void)[2][:, 2:]


def radius(height: int, width: int, tolerance: float) -> int:
    """Matching radius in pixels: `tolerance` of the diagonal rounded up, in float64; from 1 on the radius itself.

    Raises ValueError for a negative tolerance, or one above 1 that is not a whole number.
    """
    if not tolerance >= 0 or (tolerance >= 1 and tolerance != int(tolerance)):
        raise ValueError(f"tolerance {tolerance} is neither a share of the diagonal nor a whole number of pixels")
    return int(tolerance) if tolerance >= 1 else math.ceil(tolerance * math.sqrt(height * height + width * width))


def jaccard(inter: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Integer counts to float64 ratios, 1 where the union is empty."""
    return np.where(union == 0, 1.0, inter / np.maximum(union, 1))


def f_measure(counts: np.ndarray) -> np.ndarray:
    """int64 (T,4) of `boundary_counts` to float64 (T,).

    Without any boundary on either side F is 1, with one on a single side 0. The order of the operations is upstream's,
    for equality in the last bit.
    """
    n_gt, n_pred, m_gt, m_pred = counts.T
    precision = np.where(n_pred == 0, 1.0, m_pred / np.maximum(n_pred, 1))
    recall = np.where(n_gt == 0, 1.0, m_gt / np.maximum(n_gt, 1))
    total = precision + recall
    return np.where(total == 0, 0.0, 2 * precision * recall / np.where(total == 0, 1.0, total))


def _as_masks(pred: np.ndarray, gt: np.ndarray, void: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    pred, gt = np.asarray(pred).astype(bool, copy=False), np.asarray(gt).astype(bool, copy=False)
    if gt.ndim != 3 or pred.shape != gt.shape:
        raise ValueError(f"prediction {pred.shape} and ground truth {gt.shape} must be masks of one shape (T, H, W)")
    if void is None:
        return pred, gt
    keep = ~np.asarray(void).astype(bool, copy=False)
    if keep.shape != gt.shape:
        raise ValueError(f"void map {keep.shape} must have the shape {gt.shape} of the ground truth")
    return pred & keep, gt & keep
