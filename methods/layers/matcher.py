"""Which query answers for the target: the cheapest one over the whole tube, chosen per decoder layer and clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from fewref.methods.layers.boxes import generalised_iou, to_corners


@dataclass(frozen=True)
class Tubes:
    """Predictions of D layers for B clips, stacked: logits (D,B,T,Q,K) of K classes, boxes (D,B,T,Q,4) cxcywh, masks
    (D,B,T,Q,h,w)."""

    logits: Tensor
    boxes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Truth:
    """Targets of B clips: boxes (B,T,4) cxcywh in [0,1]; masks (B,T,h,w) at stride 4 and valid (B,T), float 0/1; labels
    int64 (B,T), the class, 0 where there is only one."""

    boxes: Tensor
    masks: Tensor
    valid: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LossWeights:
    """Factors of the five terms, the same in the matching cost and in the loss (CMA as released).

    affinity: of `affinity_loss`, an extension for networks that report their affinity; no part of the matching.
    """

    ce: float = 2.0
    bbox: float = 5.0
    giou: float = 2.0
    mask: float = 2.0
    dice: float = 5.0
    affinity: float = 1.0


@torch.no_grad()
def matching_cost(tubes: Tubes, truth: Truth, weights: LossWeights, classify_valid: bool = False) -> Tensor:
    """Cost (D,B,Q) of letting a query answer for its clip's target; every frame counts, also where it is invalid.

    classify_valid: only valid frames count in the cost of the class, which is 0 for a clip without any.
    Source: specification of CMA, section 6 (`hengliusky/Few_shot_RVOS`); `wjn922/ReferFormer` for `classify_valid`.
    """
    probability = _target_class(tubes.logits, truth.labels).sigmoid()
    present = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    absent = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    frames = truth.valid if classify_valid else torch.ones_like(truth.valid)
    share = frames / frames.sum(1, keepdim=True).clamp(min=1)  # (B,T)
    target = truth.boxes[:, :, None]  # (B,T,1,4)
    distance = (tubes.boxes - target).abs().sum(-1)
    overlap = generalised_iou(to_corners(tubes.boxes), to_corners(target))
    masks = truth.masks[:, :, None].expand_as(tubes.masks)
    focal = sigmoid_focal_loss(tubes.masks, masks, alpha=0.25, gamma=2.0).mean((2, 4, 5))
    return (
        weights.ce * ((present - absent) * share[..., None]).sum(2)
        + weights.bbox * distance.mean(2)
        - weights.giou * overlap.mean(2)
        + weights.mask * focal
        - weights.dice * tube_dice(tubes.masks.transpose(2, 3), truth.masks[:, None])
    )


def _target_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits (D,B,T,Q,K) those of each frame's class, labels (B,T) -> (D,B,T,Q)."""
    columns = labels[None, :, :, None, None].expand(*logits.shape[:-1], 1)
    return logits.gather(-1, columns)[..., 0]


def tube_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Smoothed dice (2Σσm+1)/(Σσ+Σm+1) of mask logits against masks (..., T,h,w), summed over the last three axes."""
    probability = logits.sigmoid()
    shared = (probability * masks).sum((-3, -2, -1))
    return (2 * shared + 1) / (probability.sum((-3, -2, -1)) + masks.sum((-3, -2, -1)) + 1)


def match(cost: Tensor) -> Tensor:
    """Index (D,B) of the cheapest query from costs (D,B,Q); the first of equals. There is one target per clip."""
    return cost.argmin(-1)
