"""The A2D- and JHMDB-Sentences metrics: precision at IoU thresholds, overall and mean IoU, COCO mAP."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
COCO_NAMES = ("mAP", "AP50", "AP75", "AP-small", "AP-medium", "AP-large")


def a2d_metrics(ids: Sequence[str], gt: Sequence[np.ndarray], pred: Sequence[np.ndarray], scores: np.ndarray) -> dict:
    """All metrics over M samples of one instance each.

    ids: unique image ids; gt: bool (H,W) per sample; pred: bool (Q,H,W) per sample, of the same size; scores: float
    (M,Q). Returns floats under "P@0.5" ... "P@0.9" (share of samples whose best-scored mask exceeds the IoU),
    "overall_iou", "mean_iou" and the six of COCO_NAMES (-1 where no instance has that size).
    Raises ValueError where lengths or shapes do not fit. Source: wjn922/ReferFormer, mttr2021/MTTR; spec scoring.md 6.
    """
    if not len(ids) == len(gt) == len(pred) == len(scores) or len(set(ids)) != len(ids) or not len(ids):
        raise ValueError("ids (unique, at least one), gt, pred and scores must have one entry per sample")
    for name, truth, masks, values in zip(ids, gt, pred, scores, strict=True):
        if masks.shape != (len(values), *truth.shape):
            raise ValueError(f"{name}: masks {masks.shape} do not fit truth {truth.shape} and {len(values)} scores")
    # A stable ascending sort puts the last of equal scores at the end.
    best = [masks[np.argsort(values, kind="stable")[-1]] for masks, values in zip(pred, scores, strict=True)]
    inter = np.array([np.count_nonzero(p & g) for p, g in zip(best, gt, strict=True)], np.int64)
    union = np.array([np.count_nonzero(p | g) for p, g in zip(best, gt, strict=True)], np.int64)
    smooth = (inter.astype(np.float32) + np.float32(1e-6)) / (union.astype(np.float32) + np.float32(1e-6))
    result = {f"P@{x}": float(np.mean(smooth > np.float32(x))) for x in THRESHOLDS}
    result |= {"overall_iou": float(inter.sum() / max(union.sum(), 1)), "mean_iou": float(smooth.mean())}
    return result | dict(zip(COCO_NAMES, _coco_statistics(ids, gt, pred, scores), strict=True))


def _coco_statistics(ids: Sequence[str], gt: Sequence, pred: Sequence, scores: np.ndarray) -> list[float]:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encode(mask: np.ndarray) -> dict:
        return rle.encode(np.asfortranarray(mask, np.uint8))

    truth, found = COCO(), []
    images = [{"id": name, "height": g.shape[0], "width": g.shape[1]} for name, g in zip(ids, gt, strict=True)]
    annotations = []
    for number, (name, g) in enumerate(zip(ids, gt, strict=True), 1):
        code = encode(g)
        box, area = rle.toBbox(code).tolist(), float(rle.area(code))
        common = {"id": number, "image_id": name, "category_id": 1, "iscrowd": 0}
        annotations.append({**common, "segmentation": code, "area": area, "bbox": box})
    for name, masks, values in zip(ids, pred, scores, strict=True):
        found += [
            {"image_id": name, "category_id": 1, "segmentation": encode(mask), "score": float(value)}
            for mask, value in zip(masks, values, strict=True)
        ]
    truth.dataset = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), iouType="segm")
        evaluation.params.useCats = 0
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:6]]
