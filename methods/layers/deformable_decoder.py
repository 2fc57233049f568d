"""The deformable decoder with boxes refined layer by layer, and the whole deformable transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewref.kernels.deformable_attention import Shapes
from fewref.methods.layers.attention import Attention
from fewref.methods.layers.deformable import DeformableEncoder, MSDeformAttn, valid_ratio
from fewref.methods.layers.mlp import MLP, Linear, feed_forward, xavier_matrices
from fewref.methods.layers.position import sine_anchors


class Memory(NamedTuple):
    """An encoder's result as the decoder attends to it: tokens (N,S,C) of all levels, the (h,w) of each level, and
    padding bool (N,S)."""

    tokens: Tensor
    shapes: Shapes
    padding: Tensor | None


class DeformableDecoderLayer(nn.Module):
    """Self attention among the queries of a frame, deformable attention to the memory, feed-forward part.

    The norms are numbered as in upstream checkpoints: they act in the order 2, 1, 3.
    """

    def __init__(self, channels: int, heads: int, ffn: int, dropout: float, levels: int, points: int) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(channels, levels, heads, points)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attn = Attention(channels, heads, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.linear1 = Linear(channels, ffn)
        self.linear2 = Linear(ffn, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor | None,
        tracking: Memory | None = None,
    ) -> Tensor:
        """x and positions (N,Q,C), references (N,Q,L,2|4), memory (N,S,C), padding bool (N,S) -> (N,Q,C).

        tracking: a second memory that the queries attend to first, with the same references, weights and norm
        (TF2 specification, section 2).
        """
        placed = x + positions
        x = self.norm2(x + self.dropout(self.self_attn(placed, placed, x)))
        for seen in (tracking, Memory(memory, shapes, padding)):
            if seen is not None:
                x = self.norm1(x + self.dropout(self.cross_attn(x + positions, references, *seen)))
        return self.norm3(x + self.dropout(feed_forward(x, self.linear1, self.linear2, self.dropout)))


class DeformableDecoder(nn.Module):
    """A stack of decoder layers; `bbox_embed` (one MLP per layer) refines the reference after each.

    use_dab: the queries are anchor boxes whose embedding is their position (DAB-DETR, Liu et al., ICLR 2022).
    refined=False: there is no `bbox_embed` and the reference points stay as they are; not with use_dab (ValueError).
    """

    bbox_embed: nn.ModuleList

    def __init__(self, layers: int, channels: int, *layer: object, use_dab: bool, refined: bool = True) -> None:
        super().__init__()
        if use_dab and not refined:
            raise ValueError(
                "anchor boxes (use_dab) are refined from layer to layer; refined=False does not go with them"
            )
        self.layers = nn.ModuleList(DeformableDecoderLayer(channels, *layer) for _ in range(layers))
        self.channels, self.use_dab, self.refined = channels, use_dab, refined
        if use_dab:
            self.query_scale = MLP(channels, channels, channels, 2)
            self.ref_point_head = MLP(2 * channels, channels, channels, 2)

    def forward(
        self,
        content: Tensor,
        positions: Tensor | None,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        valid_ratios: Tensor,
        padding: Tensor | None,
        tracking: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """content (N,Q,C); positions (N,Q,C), or None with use_dab; references (Q,4) with use_dab, else (N,Q,2);
        memory (N,S,C); valid_ratios (N,L,2) and padding bool (N,S) of the memory; tracking: see the layer.

        Returns the states (layers,N,Q,C) and the references after each layer: the refined boxes (layers,N,Q,4), which
        carry no gradient, or with refined=False the given points (layers,N,Q,2).
        """
        x, states, boxes = content, [], []
        for index, layer in enumerate(self.layers):
            placed = place_references(references, valid_ratios)
            if self.use_dab:
                positions = self._anchor_positions(x, placed[:, :, 0], first=index == 0)
            x = layer(x, positions, placed, memory, shapes, padding, tracking)
            if self.refined:
                references = refine(self.bbox_embed[index](x), references).detach()
            states.append(x)
            boxes.append(references)
        return torch.stack(states), torch.stack(boxes)

    def _anchor_positions(self, x: Tensor, anchors: Tensor, first: bool) -> Tensor:
        raw = self.ref_point_head(sine_anchors(anchors, self.channels // 2))
        return raw if first else self.query_scale(x) * raw


def place_references(references: Tensor, valid_ratios: Tensor) -> Tensor:
    """References seen from every padded level: (N,Q,2|4) with valid_ratios (N,L,2) -> (N,Q,L,2|4).

    Anchors without a batch axis, (Q,4), pair their coordinates with the *levels*: level 0 sees the box (cx,cx,cx,cx),
    level 1 (cy,cy,cy,cy), and so on. Published CMA weights are trained with this (CMA specification 3.6), so it is
    kept; it needs four levels and raises ValueError for any other number.
    """
    ratios = valid_ratios[:, None]
    if references.dim() == 2:
        if valid_ratios.shape[1] != references.shape[1]:
            raise ValueError(f"anchors need {references.shape[1]} levels, not {valid_ratios.shape[1]}")
        return references[None, :, :, None] * torch.cat((ratios, ratios), -1)
    if references.shape[-1] == 4:
        ratios = torch.cat((ratios, ratios), -1)
    return references[:, :, None] * ratios


def refine(offsets: Tensor, references: Tensor) -> Tensor:
    """Boxes cxcywh in [0,1], float32 (...,4): the references, boxes (...,4) or points (...,2), moved by offsets (...,4)
    on the logit scale; a point gives the offsets of width and height nothing to start from."""
    offsets = offsets.float()
    if references.shape[-1] == 4:
        return (offsets + inverse_sigmoid(references)).sigmoid()
    centre = offsets[..., :2] + inverse_sigmoid(references)
    return torch.cat((centre, offsets[..., 2:]), -1).sigmoid()


def inverse_sigmoid(x: Tensor, floor: float = 1e-5) -> Tensor:
    """The logit of x cut to [0,1], with numerator and denominator kept at `floor` or more."""
    x = x.clamp(0, 1)
    return (x.clamp(min=floor) / (1 - x).clamp(min=floor)).log()


@dataclass
class Decoded:
    """states (layers,N,Q,C); memory: the encoder's maps (N,C,h,w), one per level; initial: the first references, (Q,4)
    or (N,Q,2); boxes (layers,N,Q,4) after each layer, or without refinement points (layers,N,Q,2)."""

    states: Tensor
    memory: list[Tensor]
    initial: Tensor
    boxes: Tensor


class DeformableTransformer(nn.Module):
    """Deformable encoder and decoder. Frames are independent: N is clips times frames."""

    def __init__(
        self,
        *,
        channels: int = 256,
        heads: int = 8,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        ffn: int = 2048,
        dropout: float = 0.1,
        levels: int = 4,
        points: int = 4,
        use_dab: bool = True,
        refined: bool = True,
    ) -> None:
        super().__init__()
        layer = (channels, heads, ffn, dropout, levels, points)
        self.level_embed = nn.Parameter(torch.empty(levels, channels))
        self.encoder = DeformableEncoder(encoder_layers, *layer)
        self.decoder = DeformableDecoder(decoder_layers, *layer, use_dab=use_dab, refined=refined)
        if not use_dab:
            self.reference_points = Linear(channels, 2)
        self._reset_parameters()
        if refined:
            self.decoder.bbox_embed = nn.ModuleList(MLP(channels, channels, 4, 3) for _ in range(decoder_layers))

    def _reset_parameters(self) -> None:
        xavier_matrices(self)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if not self.decoder.use_dab:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def forward(
        self,
        maps: list[Tensor],
        masks: list[Tensor],
        positions: list[Tensor],
        content: Tensor,
        queries: Tensor,
        tracking: Memory | None = None,
    ) -> Decoded:
        """maps and positions (N,C,h,w) and masks bool (N,h,w), True on padding, one per level; content (N,Q,C).

        queries: anchor logits (Q,4) with use_dab, else query positions (Q,C). tracking: what `encode` gives of
        other images of the same frames, for the queries to attend to first.
        """
        return self.decode(*self.encode(maps, masks, positions), content, queries, tracking)

    def encode(self, maps: list[Tensor], masks: list[Tensor], positions: list[Tensor]) -> tuple[Memory, Tensor]:
        """The encoder's memory of maps, masks and positions as for `forward`, and its valid ratios (N,L,2)."""
        shapes = [tuple(mask.shape[-2:]) for mask in masks]
        x = torch.cat([item.flatten(2).transpose(1, 2) for item in maps], 1)  # (N,S,C)
        places = [
            item.flatten(2).transpose(1, 2) + embed for item, embed in zip(positions, self.level_embed, strict=True)
        ]
        padding = torch.cat([mask.flatten(1) for mask in masks], 1)
        valid_ratios = torch.stack([valid_ratio(mask) for mask in masks], 1)  # (N,L,2)
        tokens = self.encoder(x, torch.cat(places, 1), shapes, valid_ratios, padding)
        return Memory(tokens, shapes, padding), valid_ratios

    def decode(
        self,
        memory: Memory,
        valid_ratios: Tensor,
        content: Tensor,
        queries: Tensor,
        tracking: Memory | None = None,
    ) -> Decoded:
        """Let the queries look at what `encode` gave; content, queries and tracking as for `forward`."""
        tokens, shapes, padding = memory
        places = None
        if self.decoder.use_dab:
            references = queries.float().sigmoid()
        else:
            places = queries.expand(len(content), -1, -1)
            references = self.reference_points(places).float().sigmoid()
        states, boxes = self.decoder(content, places, references, tokens, shapes, valid_ratios, padding, tracking)
        parts = tokens.split([h * w for h, w in shapes], 1)
        maps = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
        return Decoded(states, maps, references, boxes)
