"""Answers for single annotated frames: what A2D- and JHMDB-Sentences and RefCOCO score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fewref.methods.layers.boxes import to_corners

STRIDE = 4  # of the predicted masks


@dataclass(frozen=True)
class FrameAnswer:
    """All answers of one frame: scores float32 (Q,) in [0,1], masks bool (Q,H,W) at the original size, boxes float32
    (Q,4) as x1, y1, x2, y2 in pixels of the original frame, which may reach beyond it."""

    scores: Tensor
    masks: Tensor
    boxes: Tensor


def frame_answers(outputs: dict, sizes: Tensor, originals: Sequence[tuple[int, int]]) -> list[FrameAnswer]:
    """The answers of all queries in their order, one entry per clip of a single frame (A2D, JHMDB).

    outputs: of `ReferFormerNet` with T = 1 and one class; sizes int (B,2), the unpadded input (H,W); originals: (H,W)
    per clip. Raises ValueError for more frames or classes.
    Source: `wjn922/ReferFormer`, specification section 9.
    """
    logits = _single_frame(outputs["pred_logits"])
    if logits.shape[-1] != 1:
        raise ValueError(f"expected one class, got {logits.shape[-1]}; `ranked_answers` takes several")
    return _answers(outputs, logits[..., 0].sigmoid(), None, sizes, originals)


def ranked_answers(outputs: dict, sizes: Tensor, originals: Sequence[tuple[int, int]]) -> list[FrameAnswer]:
    """The Q highest scores of all queries and classes, highest first, one entry per clip of a single frame (RefCOCO).

    With several classes a query may stand more than once. Arguments as for `frame_answers`; raises ValueError for
    more frames. Source: `wjn922/ReferFormer`, specification section 9.
    """
    logits = _single_frame(outputs["pred_logits"])
    queries, classes = logits.shape[1:]
    scores, places = logits.flatten(1).sigmoid().topk(queries, 1)
    return _answers(outputs, scores, places // classes, sizes, originals)


def _answers(
    outputs: dict, scores: Tensor, order: Tensor | None, sizes: Tensor, originals: Sequence[tuple[int, int]]
) -> list[FrameAnswer]:
    """order: int (B,Q), the query that each score (B,Q) belongs to; None for 0, 1, 2, ..."""
    masks, boxes = _single_frame(outputs["pred_masks"]), _single_frame(outputs["pred_boxes"])
    answers = []
    for clip, (size, original) in enumerate(zip(sizes.tolist(), originals, strict=True)):
        chosen = slice(None) if order is None else order[clip]
        height, width = original
        scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=boxes.device)
        answers.append(
            FrameAnswer(
                scores[clip].float(),
                _original_masks(masks[clip], tuple(size), original)[chosen],
                to_corners(boxes[clip].float())[chosen] * scale,
            )
        )
    return answers


def _original_masks(logits: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Mask logits (Q,h,w) -> bool (Q,H,W): decided at the padded input size, then brought to the original size."""
    masks = F.interpolate(logits[None].float(), scale_factor=STRIDE, mode="bilinear", align_corners=False)
    unpadded = (masks.sigmoid() > 0.5)[..., : size[0], : size[1]].float()
    return F.interpolate(unpadded, tuple(original), mode="nearest")[0].bool()


def _single_frame(output: Tensor) -> Tensor:
    """(B,1,...) -> (B,...)."""
    if output.shape[1] != 1:
        raise ValueError(f"expected clips of one frame, got {output.shape[1]}; ask the network with valid_indices")
    return output[:, 0]
