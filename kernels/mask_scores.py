"""The integers behind J and F counted on the device where the masks are, in PyTorch's own operators.

The layout is that of `packed_bits`: a byte holds one pixel of eight frames, and its slicing code for boundary and
dilation serves tensors as well as arrays. Nothing waits for the device before the counts are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewref.kernels.packed_bits import FRAMES, boundary, dilate

# Frames per pass: bounds the scratch memory, up to 4 bytes per pixel and frame, to 0.5 GB at 1080x1920.
CHUNK = 64


def frame_counts(pred: Tensor, gt: Tensor, radius: int) -> Tensor:
    """The six integers behind J and F of each frame, equal to those of `packed_bits.frame_counts`.

    pred, gt: (T,H,W) on one device, any dtype, nonzero is foreground; radius: pixels, >= 0. Returns int64 (T,6) on that
    device: intersection, union, boundary pixels of gt and of pred, matched boundary pixels of gt and of pred.
    Source: spec scoring.md 1.2, 1.3 and 8.
    """
    if not gt.numel():
        return torch.zeros((len(gt), 6), dtype=torch.int64, device=gt.device)
    chunks = zip(pred.split(CHUNK), gt.split(CHUNK), strict=True)
    return torch.cat([_count(torch.stack((_pack(g), _pack(p)), 1), radius)[: len(g)] for p, g in chunks])


def _count(planes: Tensor, radius: int) -> Tensor:
    """uint8 (groups,2,H,W) of gt and pred, a frame a bit, to int64 (8 * groups,6)."""
    height, width = planes.shape[2:]
    row, margin = width + radius, radius * (width + radius + 1)
    size = 2 * len(planes) * (height + radius) * row
    flat = planes.new_zeros(size + 2 * margin)
    edges = flat[margin : margin + size].view(len(planes), 2, height + radius, row)
    boundary(planes, edges[..., :height, :width])
    matched = edges & dilate(flat, row, radius).view(edges.shape).flip(1)
    overlap = torch.stack((planes[:, 0] & planes[:, 1], planes[:, 0] | planes[:, 1]), 1)
    counts = torch.cat([_count_bits(maps) for maps in (overlap, edges, matched)], -1)  # (groups,8,6)
    return counts.flatten(0, 1)


def _pack(masks: Tensor) -> Tensor:
    """(T,H,W) to uint8 (groups,H,W): bit k of group j is frame 8 * j + k, zero beyond the last frame."""
    packed = torch.zeros((-(-len(masks) // FRAMES), *masks.shape[1:]), dtype=torch.uint8, device=masks.device)
    for bit in range(min(FRAMES, len(masks))):
        frames = masks[bit::FRAMES] != 0
        packed[: len(frames)] |= frames.to(torch.uint8) << bit
    return packed


def _count_bits(maps: Tensor) -> Tensor:
    """uint8 (groups,n,h,w) to int64 (groups,8,n): how often each bit is set."""
    return torch.stack([(maps & (1 << bit)).count_nonzero((-2, -1)) for bit in range(FRAMES)], 1)
