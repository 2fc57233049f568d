"""Boxes as tensors: conversion between forms, and the generalised overlap that training uses."""

from __future__ import annotations

import torch
from torch import Tensor

STEADY = 1e-6


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> (..., 4) x1, y1, x2, y2 in the same unit."""
    x, y, width, height = boxes.unbind(-1)
    half_width, half_height = width / 2, height / 2
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=-1)


def to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) x1, y1, x2, y2 -> (..., 4) centre x, centre y, width, height in the same unit."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)


def generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU of boxes (..., 4) in corner form, broadcast over the leading axes; result (...), in about [-1, 1].

    Every quotient has 1e-6 added above and below, so that two empty boxes at one place overlap fully (the training of
    CMA, `hengliusky/Few_shot_RVOS`; torchvision's version lacks that). Boxes with x2 < x1 or y2 < y1 give no error,
    callers hand in boxes built from a non-negative width and height.
    """
    area = _area(first) + _area(second)
    overlap = _extent(first[..., :2].maximum(second[..., :2]), first[..., 2:].minimum(second[..., 2:]))
    hull = _extent(first[..., :2].minimum(second[..., :2]), first[..., 2:].maximum(second[..., 2:]))
    union = area - overlap
    return (overlap + STEADY) / (union + STEADY) - (hull - union + STEADY) / (hull + STEADY)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _extent(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)
