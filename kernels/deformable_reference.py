"""Multi-scale deformable attention in PyTorch's own operators: the definition, and a form that is faster on CPUs.

Operator of Deformable DETR (Zhu et al., ICLR 2021; fundamentalvision/Deformable-DETR); kernels specification 1 and 6.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]

# Samples per chunk of the bags: bounds their scratch memory to about 0.2 GB.
_CHUNK = 4_000_000


def suits_bags(value: Tensor, locations: Tensor) -> bool:
    """Bags win on a CPU for wide heads, which repay the index arithmetic, and for few samples, as in a decoder."""
    samples = locations.shape[1] * locations.shape[3] * locations.shape[4]
    return value.device.type == "cpu" and (value.shape[-1] >= 16 or samples < value.shape[1])


def sample_by_grid(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """One grid_sample per level; arguments and result of `ms_deform_attn`, one floating dtype."""
    n, _, m, d = value.shape
    q = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (N*M,Q,L,P,2)
    total = value.new_zeros(n * m, d, q)
    weights = weights.transpose(1, 2).flatten(0, 1)  # (N*M,Q,L,P)
    for level, (part, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], dim=1), shapes, strict=True)):
        if not h * w:
            continue
        plane = part.permute(0, 2, 3, 1).reshape(n * m, d, h, w)
        samples = F.grid_sample(plane, grids[:, :, level], align_corners=False)  # (N*M,D,Q,P)
        total = total + (samples * weights[:, None, :, level]).sum(-1)
    return total.view(n, m * d, q).transpose(1, 2)


def sample_by_bags(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The sparse-matrix view: a query and head is a bag of four corners per sample. CPU only; otherwise as above."""
    n, s, m, d = value.shape
    q = locations.shape[1]
    corners = 4 * weights.shape[3] * weights.shape[4]
    step = max(1, _CHUNK // max(1, q * m * corners))
    parts = []
    for start in range(0, n, step):
        items = slice(start, start + step)
        rows, shares = _corners(locations[items], weights[items], shapes)  # (n',Q,M,4K)
        count = rows.shape[0]
        rows = rows * m + torch.arange(m)[:, None]
        rows = rows + (torch.arange(count) * (s * m))[:, None, None, None]
        bags = F.embedding_bag(
            rows.view(-1, corners),
            value[items].reshape(count * s * m, d),
            per_sample_weights=shares.reshape(-1, corners),
            mode="sum",
        )
        parts.append(bags.view(count, q, m * d))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _corners(locations: Tensor, weights: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Positions along S int64 (N,Q,M,4K) of the corners of each sample, and their bilinear shares times the weights."""
    height = torch.tensor([h for h, _ in shapes])[:, None]  # (L,1)
    width = torch.tensor([w for _, w in shapes])[:, None]
    first = (height * width).cumsum(0) - height * width
    # Far points are drawn in before they become integers: the conversion of a large float is undefined.
    x = (locations[..., 0] * width - 0.5).clamp(min=-2).minimum((width + 1).to(locations))
    y = (locations[..., 1] * height - 0.5).clamp(min=-2).minimum((height + 1).to(locations))
    left, top = x.detach().floor(), y.detach().floor()
    a, b = x - left, y - top
    left, top = left.long(), top.long()
    rows, shares = [], []
    for down, along_y in ((0, 1 - b), (1, b)):
        v = top + down
        in_rows = (v >= 0) & (v < height)
        weighted = weights * along_y
        for right, along_x in ((0, 1 - a), (1, a)):
            u = left + right
            inside = in_rows & (u >= 0) & (u < width)
            rows.append((first + v * width + u).masked_fill(~inside, 0).flatten(-2))
            shares.append((weighted * along_x).masked_fill(~inside, 0).flatten(-2))
    return torch.cat(rows, -1), torch.cat(shares, -1)
