"""What every network is shown: pixels less ImageNet's mean, over its deviation."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(frames: Tensor) -> Tensor:
    """uint8 (...,3,H,W) RGB -> float32 on the same device."""
    mean, std = (torch.tensor(values, device=frames.device)[:, None, None] for values in (MEAN, STD))
    return (frames.float() / 255 - mean) / std


def normalise_padded(frames: Tensor, padding: Tensor) -> Tensor:
    """uint8 (B,T,3,H,W) -> float, normalised, and zero where padding bool (B,T,H,W) is true."""
    return normalise(frames).masked_fill(padding[:, :, None], 0)
