"""Scoring protocols: at which size and tolerance a query's masks are judged, and how frames are averaged afterwards.

PyTorch is imported only where masks are resized, so that processes which score at the original size start quickly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewref.benchmark.metrics import DAVIS_TOLERANCE, frame_scores, radius, scores_of_counts
from fewref.episodes.errors import InputError, near

SHORT_SIDE = 360
LETTERBOX = (241, 425)


@dataclass(frozen=True)
class ScoringProtocol:
    """One way to turn masks into J and F.

    resolution: "original"; "input" (the network's input size, or short side 360 where that is unknown); "letterbox"
    (241x425). tolerance: share of the image diagonal. average: "query" (frames, then queries, categories and groups),
    "frame" (all frames of a group weigh the same) or "danet" (all frames of a category weigh the same).
    """

    name: str
    summary: str
    resolution: str = "original"
    tolerance: float = DAVIS_TOLERANCE
    average: str = "query"


SCORING = {
    protocol.name: protocol
    for protocol in (
        ScoringProtocol("davis", "original size, tolerance 0.008, mean over frames of a query, then queries"),
        ScoringProtocol(
            "cma-paper",
            "the few-shot repository's scorer: network input size, tolerance 0.010, flat mean over all frames",
            resolution="input",
            tolerance=0.010,
            average="frame",
        ),
        ScoringProtocol(
            "danet-paper",
            "DANet's scorer: letterboxed into 241x425, padding included, tolerance 0.008, category means of frames",
            resolution="letterbox",
            average="danet",
        ),
        ScoringProtocol("mevis", "as davis; the truth is the union of all objects an expression names, no matching"),
    )
}


@dataclass(frozen=True)
class QueryScore:
    """J and F of every frame of one query, and what they were measured on.

    j, f: float per frame in [0,1]. height, width, radius: pixels, of the masks as scored. intersection, union: pixels
    summed over the frames, for the overall IoU. resized: the prediction was not handed over at the scored size but
    resized from the original size.
    """

    j: tuple[float, ...]
    f: tuple[float, ...]
    height: int
    width: int
    radius: int
    intersection: int
    union: int
    resized: bool = False


def get_scoring(name: str) -> ScoringProtocol:
    """The protocol of that name. Raises InputError with near names for an unknown one."""
    if name not in SCORING:
        raise InputError(f"unknown scoring protocol {name!r}; {near(name, SCORING)}")
    return SCORING[name]


def score_query(
    protocol: ScoringProtocol,
    masks: np.ndarray,
    truth: np.ndarray,
    input_masks: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> QueryScore:
    """Score one query.

    masks, truth: bool (T,H,W) at the original size; input_masks: bool (T,h,w), the prediction as cut at the network's
    input size, used by "input" resolution only. counts: int64 (T,6) of these masks at the protocol's radius, where they
    are made already (`judge.device_counts`); only for a protocol that judges at the original size. Raises InputError
    where shapes do not fit together. Source: spec scoring.md 2.3 (davis), 3 (cma-paper and danet-paper), 7 (mevis).
    """
    masks, truth = np.asarray(masks), np.asarray(truth)
    check_shapes(masks.shape, truth.shape)
    if counts is not None and protocol.resolution != "original":
        raise ValueError(f"{protocol.name} judges resized masks; counts of those at the original size do not tell")
    resized = False
    if protocol.resolution == "input":
        resized = input_masks is None
        pred = resize_masks(masks, *input_size(*truth.shape[1:])) if resized else np.asarray(input_masks)
        if pred.ndim != 3 or len(pred) != len(truth):
            raise InputError(
                f"input_masks {pred.shape} must be (T, h, w) with one mask for each of {len(truth)} frames"
            )
        truth = resize_masks(truth, *pred.shape[1:])
    elif protocol.resolution == "letterbox":
        pred, truth = letterbox_masks(masks, *LETTERBOX), letterbox_masks(truth, *LETTERBOX)
    else:
        pred = masks
    if counts is None:
        counts = frame_scores(pred, truth, protocol.tolerance)[2]
    j, f = scores_of_counts(counts)
    height, width = truth.shape[1:]
    reach = radius(height, width, protocol.tolerance)
    inter, union = counts[:, :2].sum(axis=0).tolist()
    return QueryScore(tuple(j.tolist()), tuple(f.tolist()), height, width, reach, inter, union, resized)


def check_shapes(masks: tuple[int, ...], truth: tuple[int, ...]) -> None:
    """Raises InputError where the shapes of the predicted masks and of the truth are not the same (T,H,W)."""
    if masks != truth or len(truth) != 3:
        raise InputError(f"predicted masks {masks} must have the shape {truth} of the query's frames (T, H, W)")


def input_size(height: int, width: int, short: int = SHORT_SIDE) -> tuple[int, int]:
    """Size with the shorter side at `short` pixels and the longer one in proportion, cut down to a whole number."""
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def resize_masks(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize of 0/1 masks (corners not aligned, no antialias), foreground where the value exceeds 0.5.

    masks: (T,H,W), nonzero is foreground. Returns bool (T,height,width). Exact ties become background, as upstream's.
    """
    import torch
    from torch.nn.functional import interpolate

    foreground = np.asarray(masks).astype(bool, copy=False)
    if foreground.shape[1:] == (height, width):
        return foreground
    values = torch.from_numpy(foreground.astype(np.float32))[:, None]
    return (interpolate(values, (height, width), mode="bilinear", align_corners=False)[:, 0] > 0.5).numpy()


def letterbox_masks(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks resized to fit into height x width, sizes cut down to whole numbers, centred, with empty padding.

    masks: (T,H,W). Returns bool (T,height,width). Source: scutpaul/DANet, as spec scoring.md 3 describes it.
    """
    factor = min(height / masks.shape[1], width / masks.shape[2])
    inner = max(int(factor * masks.shape[1]), 1), max(int(factor * masks.shape[2]), 1)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    boxed = np.zeros((len(masks), height, width), bool)
    boxed[:, top : top + inner[0], left : left + inner[1]] = resize_masks(masks, *inner)
    return boxed


def sequence_statistics(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay of a per-frame vector (n,), n >= 1.

    NaN is left out of the means and counts as a miss in recall, the share of values above 0.5. Decay is the mean of the
    first quarter less that of the last; neighbouring quarters share a frame. Source: davis2017-evaluation, spec
    scoring.md 2.1; the edges are kept in 64 bits, where upstream's wrap from 256 frames on.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected a vector of at least one frame, got shape {values.shape}")
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(np.int64) - 1
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return _nan_mean(values), float(np.mean(values > 0.5)), _nan_mean(first) - _nan_mean(last)


def _nan_mean(values: np.ndarray) -> float:
    return math.nan if np.isnan(values).all() else float(np.nanmean(values))


@dataclass(frozen=True)
class PooledScore:
    """Frame-weighted means per slot, in the order in which slots first appear.

    slots: names; j, f: mean over all frames of a slot; iou: summed intersection over summed union; frames: how many.
    """

    slots: tuple[str, ...]
    j: tuple[float, ...]
    f: tuple[float, ...]
    iou: tuple[float, ...]
    frames: tuple[int, ...]

    @property
    def mean_j(self) -> float:
        """Mean over slots."""
        return float(np.mean(self.j))

    @property
    def mean_f(self) -> float:
        """Mean over slots."""
        return float(np.mean(self.f))


def pool_frames(scores: Sequence[QueryScore], slots: Sequence[str]) -> PooledScore:
    """Accumulate queries into slots, as the few-shot repository's scorer does (spec scoring.md 3.5).

    slots: one name per query. The same name for all gives `micro`, the number which the released script prints; the
    category gives `macro`, a mean of category means. The overall IoU of a slot without any foreground is 1.
    """
    sums: dict[str, list[float]] = {}
    for score, slot in zip(scores, slots, strict=True):
        total = sums.setdefault(slot, [0.0, 0.0, 0, 0, 0])
        for j, f in zip(score.j, score.f, strict=True):
            total[0] += j
            total[1] += f
        total[2] += score.intersection
        total[3] += score.union
        total[4] += len(score.j)
    columns = [
        (j / max(frames, 1), f / max(frames, 1), inter / union if union else 1.0, frames)
        for j, f, inter, union, frames in sums.values()
    ]
    return PooledScore(tuple(sums), *(tuple(column) for column in zip(*columns, strict=True)))
