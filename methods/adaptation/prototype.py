"""`prototype`: masked average pooling of visual features as a nearest-prototype segmenter, without the sentence.

Adaptation specification, 5, after Prototypical Networks (arXiv 1703.05175).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewref.episodes.types import Prediction, Query, Shot
from fewref.methods.adaptation.record import AdaptationError
from fewref.methods.base import Trainable

EPSILON = 1e-6
SMALLEST = 1.0  # pixels of the feature map that a frame's object must cover to count


@dataclass(frozen=True)
class Prototypes:
    """The mean feature of the object and of the rest, float64 (C,) each."""

    foreground: Tensor
    background: Tensor


@torch.no_grad()
def prototypes(method: Trainable, shots: Sequence[Shot]) -> Prototypes:
    """Pool all frames of all shots together, every pixel weighing the same.

    Raises AdaptationError where the object covers less than one pixel of the feature map in every frame.
    """

    def clips() -> Iterable[tuple[Tensor, Tensor]]:
        for shot in shots:
            for places in _windows(len(shot.frames), method.window):
                maps = method.features(shot.frames[places])
                yield maps, soft_masks(shot.masks[places], maps)

    return pool(clips())


@torch.no_grad()
def answer(method: Trainable, known: Prototypes, query: Query, temperature: float) -> Prediction:
    """Masks bool (T,H,W) at the original size; confidence: mean probability of the marked pixels, 0 without any."""
    size = query.frames.shape[-2:]
    probs = []
    for places in _windows(len(query.frames), method.window):
        prob = foreground_probability(method.features(query.frames[places]), known, temperature)
        probs.append(F.interpolate(prob[:, None], size, mode="bilinear", align_corners=False)[:, 0])
    prob = torch.cat(probs)
    masks = prob > 0.5
    confidence = float(prob[masks].mean()) if masks.any() else 0.0
    return Prediction(query.id, masks.cpu().numpy(), min(confidence, 1.0))


def soft_masks(masks: np.ndarray, maps: Tensor) -> Tensor:
    """Masks bool (T,H,W) on the grid of maps (T,C,h,w): float64 (T,h,w) in [0,1], bilinear."""
    soft = torch.tensor(masks, dtype=torch.float64, device=maps.device)[:, None]
    return F.interpolate(soft, maps.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def pool(clips: Iterable[tuple[Tensor, Tensor]], epsilon: float = EPSILON) -> Prototypes:
    """Prototypes of features (T,C,h,w) under soft masks (T,h,w), clip after clip, summed in float64.

    Frames whose mask sums to less than one pixel are left out. Raises AdaptationError where none is left.
    """
    sums: list[list[Tensor]] = []
    for maps, masks in clips:
        for frame, mask in zip(maps.double(), masks.double(), strict=True):
            if mask.sum() >= SMALLEST:
                rest = 1 - mask
                sums.append([(frame * mask).sum((1, 2)), mask.sum(), (frame * rest).sum((1, 2)), rest.sum()])
    if not sums:
        raise AdaptationError("the support's object covers less than one pixel of the feature map in every frame")
    inside, area, outside, rest = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
    return Prototypes(inside / (area + epsilon), outside / (rest + epsilon))


def foreground_probability(maps: Tensor, known: Prototypes, temperature: float = 20.0) -> Tensor:
    """Softmax over the two cosines times `temperature`: maps (T,C,h,w) -> float64 (T,h,w) in [0,1]."""
    maps = F.normalize(maps.double(), dim=1)
    both = F.normalize(torch.stack((known.foreground, known.background)), dim=1)
    cosines = torch.einsum("tchw,kc->kthw", maps, both)
    return (temperature * (cosines[0] - cosines[1])).sigmoid()


def _windows(frames: int, window: int) -> list[slice]:
    return [slice(start, start + window) for start in range(0, frames, window)]
