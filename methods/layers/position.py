"""Sine position encodings of maps, words and anchor boxes; no parameters, always in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _frequencies(channels: int, device: torch.device) -> Tensor:
    index = torch.arange(channels, dtype=torch.float32, device=device)
    return 10000.0 ** (2 * (index // 2) / channels)


def _interleave(angles: Tensor) -> Tensor:
    """sin of the even and cos of the odd entries of the last axis."""
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_positions_2d(mask: Tensor, channels: int) -> Tensor:
    """Position of every cell of a padded map: bool (N,h,w), True on padding -> float32 (N,channels,h,w), y before x.

    Cells count from 0.5 of the unpadded extent. Rows and columns that are all padding give values decided by float32
    rounding which still reach valid cells further on, so the order of operations here is part of the definition
    (CMA specification 3.2).
    """
    inside = ~mask
    y = inside.cumsum(1, dtype=torch.float32)
    x = inside.cumsum(2, dtype=torch.float32)
    y = (y - 0.5) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = (x - 0.5) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    frequencies = _frequencies(channels // 2, mask.device)
    parts = [_interleave(angle[..., None] / frequencies) for angle in (y, x)]
    return torch.cat(parts, dim=-1).permute(0, 3, 1, 2)


def sine_positions_1d(mask: Tensor, channels: int) -> Tensor:
    """Position of every word: bool (B,L), True on padding -> float32 (B,L,channels). Words count from 1."""
    x = (~mask).cumsum(1, dtype=torch.float32)
    x = x / (x[:, -1:] + 1e-6) * (2 * math.pi)
    return _interleave(x[..., None] / _frequencies(channels, mask.device))


def sine_anchors(anchors: Tensor, channels: int) -> Tensor:
    """Embedding of boxes (...,4) cx,cy,w,h or points (...,2) in [0,1]: `channels` each, ordered y,x,w,h."""
    order = [1, 0, 2, 3][: anchors.shape[-1]]
    angles = anchors[..., order, None].float() * (2 * math.pi) / _frequencies(channels, anchors.device)
    return _interleave(angles).flatten(-2)
