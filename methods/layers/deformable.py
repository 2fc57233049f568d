"""Deformable attention as a module, and the deformable encoder (Deformable DETR, Zhu et al., ICLR 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewref.kernels.deformable_attention import Shapes, ms_deform_attn
from fewref.kernels.dispatch import COMPILED, choose
from fewref.kernels.linear import linear
from fewref.methods.layers.mlp import Linear, feed_forward
from fewref.methods.layers.piecewise import by_frame


class MSDeformAttn(nn.Module):
    """Every query looks at `points` learnt places per level and head around its reference point or box."""

    def __init__(self, channels: int = 256, levels: int = 4, heads: int = 8, points: int = 4) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be divided among {heads} heads")
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = Linear(channels, heads * levels * points * 2)
        self.attention_weights = Linear(channels, heads * levels * points)
        self.value_proj = Linear(channels, channels)
        self.output_proj = Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start on a ring of directions, one per head, growing with the point; weights start equal."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)[:, None]
        bias = (directions[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def samples(self, query: Tensor, references: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Where each query (N,Q,C) looks and how much each place counts, both float32.

        Returns locations (N,Q,M,L,P,2) in units of the map and weights (N,Q,M,L,P) that sum to 1 per head. Offsets are
        pixels of their level for reference points, and halves of the box divided by P for reference boxes.
        """
        n, q, _ = query.shape
        grouped = (n, q, self.heads, self.levels, self.points)
        weights = self.attention_weights(query).float().view(n, q, self.heads, -1).softmax(-1).view(grouped)
        references = references.float()[:, :, None, :, None]  # (N,Q,1,L,1,2|4)
        if references.shape[-1] == 4:
            offsets = self.sampling_offsets(query).float().view(*grouped, 2)
            return references[..., :2] + offsets / self.points * references[..., 2:] * 0.5, weights
        # Dividing the weights is cheaper than dividing what they give; adding rows of many numbers, than many of two.
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=query.device)
        scale = (1 / sizes)[None, :, None].expand(self.heads, -1, self.points, -1).flatten()
        layer = self.sampling_offsets
        offsets = linear(query, layer.weight * scale[:, None], layer.bias * scale).float().view(n, q, self.heads, -1)
        places = references.expand(-1, -1, -1, -1, self.points, -1).flatten(3)
        return (places + offsets).view(*grouped, 2), weights

    def forward(
        self, query: Tensor, references: Tensor, source: Tensor, shapes: Shapes, padding: Tensor | None = None
    ) -> Tensor:
        """query (N,Q,C) with positions, references (N,Q,L,2|4) float32, source (N,S,C) -> (N,Q,C).

        padding: bool (N,S), True where the source is to count as zero. Source: kernels specification 1.6.
        """
        locations, weights = self.samples(query, references, shapes)
        if self._samples_first(query, source):
            return self.output_proj(self._project_samples(source, shapes, locations, weights, padding))
        value = self.value_proj(source)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (self.heads, -1))
        return self.output_proj(ms_deform_attn(value, shapes, locations, weights))

    def _samples_first(self, query: Tensor, source: Tensor) -> bool:
        """Whether few samples, as in a decoder, make it cheaper to project these than all of the source."""
        corners = 4 * query.shape[1] * self.heads * self.levels * self.points
        few = corners * self.heads <= source.shape[1] * source.shape[2]
        return few and choose("deformable_attention", source.device, source.dtype) in COMPILED

    def _project_samples(
        self, source: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, padding: Tensor | None
    ) -> Tensor:
        """Sampling and projection exchanged, which are both linear: each head samples the source, then projects with
        its own part of the matrix; the bias counts as much as there are weights inside (kernels specification 6.4)."""
        inside = source.new_ones(*source.shape[:2], 1)
        if padding is not None:
            source, inside = (item.masked_fill(padding[..., None], 0) for item in (source, inside))
        sampled = ms_deform_attn(source[:, :, None], shapes, locations, weights).unflatten(-1, (self.heads, -1))
        share = ms_deform_attn(inside[:, :, None], shapes, locations, weights)[..., None]  # (N,Q,M,1)
        matrices = self.value_proj.weight.unflatten(0, (self.heads, -1))  # (M,D,C)
        projected = torch.einsum("nqmc,mdc->nqmd", sampled, matrices)
        return (projected + share * self.value_proj.bias.view(self.heads, -1)).flatten(2)


class DeformableEncoderLayer(nn.Module):
    """Deformable self attention and a feed-forward part, each followed by its residual and norm."""

    def __init__(self, channels: int, heads: int, ffn: int, dropout: float, levels: int, points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(channels, levels, heads, points)
        self.norm1 = nn.LayerNorm(channels)
        self.linear1 = Linear(channels, ffn)
        self.linear2 = Linear(ffn, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, positions: Tensor, references: Tensor, shapes: Shapes, padding: Tensor | None
    ) -> Tensor:
        """x and positions (N,S,C), references (N,S,L,2), padding bool (N,S) -> (N,S,C)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + positions, references, x, shapes, padding)))
        return self.norm2(x + self.dropout(feed_forward(x, self.linear1, self.linear2, self.dropout)))


class DeformableEncoder(nn.Module):
    """A stack of encoder layers over all levels at once."""

    def __init__(self, layers: int, *layer: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableEncoderLayer(*layer) for _ in range(layers))

    def forward(
        self, x: Tensor, positions: Tensor, shapes: Shapes, valid_ratios: Tensor, padding: Tensor | None
    ) -> Tensor:
        """x and positions (N,S,C), valid_ratios float32 (N,L,2), padding bool (N,S) -> (N,S,C)."""
        references = grid_references(shapes, valid_ratios)

        def run(x: Tensor, positions: Tensor, references: Tensor, padding: Tensor | None = None) -> Tensor:
            for layer in self.layers:
                x = layer(x, positions, references, shapes, padding)
            return x

        frames = (x, positions, references) + (() if padding is None else (padding,))
        return by_frame(run, frames)


def valid_ratio(mask: Tensor) -> Tensor:
    """Unpadded share (width, height) float32 (N,2) of maps, read off the first row and column of bool (N,h,w)."""
    inside = ~mask
    return torch.stack((inside[:, 0, :].float().mean(1), inside[:, :, 0].float().mean(1)), -1)


def grid_references(shapes: Shapes, valid_ratios: Tensor) -> Tensor:
    """Centre of every cell seen from every level, float32 (N,S,L,2), from valid_ratios (N,L,2)."""
    points = []
    for level, (h, w) in enumerate(shapes):
        y, x = torch.meshgrid(
            torch.arange(h, dtype=torch.float32, device=valid_ratios.device) + 0.5,
            torch.arange(w, dtype=torch.float32, device=valid_ratios.device) + 0.5,
            indexing="ij",
        )
        cells = torch.stack((x, y), -1).view(1, -1, 2)
        points.append(cells / (valid_ratios[:, level, None] * torch.tensor([w, h], device=cells.device)))
    return torch.cat(points, 1)[:, :, None] * valid_ratios[:, None]
