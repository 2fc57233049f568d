"""The network of CMA and of its two ablations: a clip, a sentence and an annotated support clip to boxes and masks.

"Learning Cross-Modal Affinity for Referring Video Object Segmentation Targeting Limited Samples" (ICCV 2023);
upstream hengliusky/Few_shot_RVOS. Numbers in comments are sections of the CMA specification. Upstream serves one clip
at a time; here every item of a batch has a sentence and a support of its own, and with one item the results are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewref.episodes.errors import InputError, near
from fewref.methods.cma.affinity import (
    QKV,
    VARIANTS,
    PreparedSupport,
    SupportFeatures,
    SupportShot,
    prepare_support,
    rewrite_level,
    support_transform,
)
from fewref.methods.layers.deformable_decoder import Decoded, DeformableTransformer, refine
from fewref.methods.layers.fpn import CrossModalFPN
from fewref.methods.layers.fusion import VisionLanguageFusion
from fewref.methods.layers.mask_head import build_controller, layer_masks
from fewref.methods.layers.mlp import FeatureResizer
from fewref.methods.layers.position import sine_positions_1d, sine_positions_2d
from fewref.methods.text import TextFeatures, encode_sentences

LEVELS = 4  # strides 8, 16, 32 and 64


@dataclass
class QueryMaps:
    """What of a query clip does not depend on the sentence; N = B*T.

    stride4: the raw backbone map (N,C4,h,w); projected: four maps (B,T,C,h,w) at strides 8 to 64;
    masks bool (N,h,w) and positions float32 (N,C,h,w): five each, strides 4 to 64.
    """

    stride4: Tensor
    projected: list[Tensor]
    masks: list[Tensor]
    positions: list[Tensor]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Sizes (h,w) of the four levels, as `CMANet.prepare_support` takes them."""
        return [tuple(item.shape[-2:]) for item in self.projected]


class _Body(nn.Module):
    """Gives the backbone the name it has in upstream checkpoints, `backbone.0.body`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body


class CMANet(nn.Module):
    """CMA ("cma"), self affinity only ("self"), or no affinity ("base").

    backbone: from `build_backbone`; text_encoder: from `build_text_encoder`. queries: per frame (times num_patterns if
    that is not 0). The default sizes are upstream's; names and shapes of the state dict equal upstream's. Frozen parts
    get no gradient, but in train mode a frozen text encoder keeps its dropout, as upstream. support_gain: factor of the
    support's fresh weights, which then begin as those of the query; 0 leaves them random, as upstream, which suits a
    start from another checkpoint. watch_affinity: in train
    mode the output has `affinity`, how much each query token attends to the object in the support, for a loss on it.
    Raises InputError for an unknown variant.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        text_encoder: nn.Module,
        variant: str = "cma",
        use_dab: bool = True,
        hidden: int = 256,
        heads: int = 8,
        ffn: int = 2048,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        points: int = 4,
        queries: int = 5,
        dropout: float = 0.1,
        mask_channels: int = 8,
        num_patterns: int = 0,
        freeze_backbone: bool = True,
        freeze_text: bool = True,
        support_gain: float = 0.0,
        watch_affinity: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(f"unknown CMA variant {variant!r}: {near(variant, VARIANTS)}")
        self.variant, self.use_dab, self.mask_channels = variant, use_dab, mask_channels
        self.hidden, self.queries, self.num_patterns = hidden, queries, num_patterns
        self.freeze_backbone, self.freeze_text = freeze_backbone, freeze_text
        self.watch_affinity = watch_affinity and variant == "cma"
        # The order of the blocks is that of upstream's state dict: tied names are listed under the first (4).
        self.transformer = DeformableTransformer(
            channels=hidden,
            heads=heads,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            ffn=ffn,
            dropout=dropout,
            levels=LEVELS,
            points=points,
            use_dab=use_dab,
        )
        self.class_embed = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(decoder_layers))
        self.bbox_embed = self.transformer.decoder.bbox_embed
        if use_dab:
            self.tgt_embed = nn.Embedding(queries, hidden)
            self.refpoint_embed = nn.Embedding(queries, 4)
            if num_patterns:
                self.patterns_embed = nn.Embedding(num_patterns, hidden)
        else:
            self.query_embed = nn.Embedding(queries, hidden)
        self.input_proj = _projections(backbone.channels, hidden)
        self.backbone = nn.Sequential(_Body(backbone))
        self.text_encoder = text_encoder
        self.resizer = FeatureResizer(text_encoder.config.hidden_size, hidden, dropout)
        self.fusion_module = VisionLanguageFusion(hidden, heads)
        self.pixel_decoder = CrossModalFPN((backbone.channels[0], *[hidden] * 3), hidden, hidden, heads, ffn, dropout)
        self.controller = build_controller(hidden, hidden, mask_channels)
        self.support_qkv = QKV(hidden, hidden // 2)
        self.query_qkv = QKV(hidden, hidden // 2)
        self.conv_q = nn.Conv2d(hidden, hidden // 2, 1)
        self.layer_norm = nn.LayerNorm(hidden // 2)
        self.dropout = nn.Dropout(dropout)
        self._reset_heads()
        if support_gain:
            self._make_similarity(support_gain)
        self.backbone.requires_grad_(not freeze_backbone)
        self.text_encoder.requires_grad_(not freeze_text)

    def _reset_heads(self) -> None:
        for layer in self.class_embed:
            nn.init.constant_(layer.bias, -math.log(99))  # probability 0.01, as focal loss wants
        for index, mlp in enumerate(self.bbox_embed):
            nn.init.zeros_(mlp.layers[-1].weight)
            nn.init.zeros_(mlp.layers[-1].bias)
            if index == 0:
                nn.init.constant_(mlp.layers[-1].bias[2:], -2.0)

    def _make_similarity(self, gain: float) -> None:
        """Let attention to the support begin as a similarity that is seen beside the query's normalised features."""
        self.support_qkv.Key.load_state_dict(self.query_qkv.query.state_dict())
        with torch.no_grad():
            self.support_qkv.Key.weight.mul_(gain)
            self.support_qkv.Value.weight.mul_(gain)

    def encode_text(self, ids: Tensor, attention: Tensor) -> TextFeatures:
        """Token ids and attention (1 on tokens), both int64 (B,L) -> features of width `hidden`."""
        words, pooled = encode_sentences(self.text_encoder, ids, attention, self.freeze_text)
        return TextFeatures(self.resizer(words), attention != 1, self.resizer(pooled))

    def encode_query(self, frames: Tensor, padding: Tensor) -> QueryMaps:
        """frames float (B,T,3,H,W), normalised and zero on padding; padding bool (B,T,H,W), True right and below."""
        maps = self._backbone_maps(frames)
        projected = [item.unflatten(0, frames.shape[:2]) for item in self._project(maps)]
        sizes = [item.shape[-2:] for item in (maps[0], *projected)]
        full = padding.flatten(0, 1)[:, None].float()
        masks = [F.interpolate(full, size)[:, 0].bool() for size in sizes]
        positions = [sine_positions_2d(mask, self.hidden) for mask in masks]
        return QueryMaps(maps[0], projected, masks, positions)

    def encode_support(
        self, frames: Tensor, padding: Tensor, masks: Tensor | list[Tensor], text: TextFeatures
    ) -> SupportFeatures:
        """One annotated clip per item, once per episode. Several shots: `merge_shots`.

        frames float (B,S,3,H,W), normalised; padding bool (B,S,H,W) has no influence (3.5); masks: (B,S,H0,W0), or B
        tensors (S,H0,W0), 0/1 at any resolution; text: the support's sentence.
        Raises ValueError where masks and frames do not match.
        """
        b, s = frames.shape[:2]
        if len(masks) != b or any(len(mask) != s for mask in masks):
            raise ValueError(f"support masks of {[len(m) for m in masks]} frames do not match {b} clips of {s} frames")
        only_middle = self.variant == "cma"
        middle = slice(s // 2, s // 2 + 1)
        if only_middle and not self.backbone[0].body.temporal:
            frames, s = frames[:, middle], 1
        maps = [item.unflatten(0, (b, s)) for item in self._backbone_maps(frames)]
        if only_middle and s > 1:
            maps, s = [item[:, middle] for item in maps], 1
        projected = self._project([item.flatten(0, 1) for item in maps])
        projected = [support_transform(item) for item in projected[:3]] + projected[3:]  # not at stride 64 (3.4)
        fused = [self._fuse(item.unflatten(0, (b, s)), text) for item in projected]
        return SupportFeatures([SupportShot(fused, [mask[middle] if only_middle else mask for mask in masks])])

    def prepare_support(self, support: SupportFeatures, shapes: list[tuple[int, int]]) -> PreparedSupport:
        """Bring a support to the sizes of the query's four levels (`QueryMaps.shapes`); worth keeping per size."""
        return prepare_support(support, shapes, self.variant, self.support_qkv)

    def forward(
        self,
        query: Tensor | QueryMaps,
        padding: Tensor | None,
        sizes: Tensor,
        text: TextFeatures,
        support: SupportFeatures | PreparedSupport,
        auxiliary: bool = True,
    ) -> dict:
        """Boxes and masks of every query in every frame (3.10).

        query and padding as for `encode_query`, or its result (padding is then not read); sizes int (B,2), the
        unpadded input (H,W). Returns pred_logits (B,T,Q,1), pred_boxes (B,T,Q,4) cxcywh in [0,1], pred_masks
        (B,T,Q,h,w) logits at stride 4; with `auxiliary` also aux_outputs, the same of the earlier decoder layers; in
        eval mode reference_points (B,T,Q,2), the centres which the last layer started from; in train mode with
        `watch_affinity` affinity, per level (B,T,h,w) in [0,1].
        Raises ValueError where a prepared support belongs to other sizes.
        """
        maps = query if isinstance(query, QueryMaps) else self.encode_query(query, padding)
        if isinstance(support, SupportFeatures):
            support = self.prepare_support(support, maps.shapes)
        elif support.shapes != maps.shapes:
            raise ValueError(f"support prepared for {support.shapes}, but the query has {maps.shapes}")
        b, t = maps.projected[0].shape[:2]
        attention: list[Tensor] | None = [] if self.watch_affinity and self.training else None
        decoded = self.transformer(
            self.affinity([self._fuse(item, text) for item in maps.projected], support, attention),
            maps.masks[1:],
            maps.positions[1:],
            *self._queries(text.sentence, t),
        )
        features = self._pixel_features(maps, decoded, text)
        layers = self._predict(decoded, features, sizes.repeat_interleave(t, 0), auxiliary)
        layers = [{name: item.unflatten(0, (b, t)) for name, item in layer.items()} for layer in layers]
        output = dict(layers[-1])
        if auxiliary:
            output["aux_outputs"] = layers[:-1]
        if attention is not None:
            output["affinity"] = attention
        if not self.training:
            output["reference_points"] = decoded.boxes[-2, ..., :2].unflatten(0, (b, t))
        return output

    def affinity(
        self, fused: list[Tensor], support: PreparedSupport, attention: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Fused query maps, four of (B,T,C,h,w) -> the transformer's inputs, four of (B*T,C,h,w) (3.5).

        attention: see `rewrite_level`.
        """
        modules = (self.query_qkv, self.conv_q, self.layer_norm, self.dropout)
        levels = zip(fused, support.levels, strict=True)
        return [rewrite_level(query, level, self.variant, *modules, attention).flatten(0, 1) for query, level in levels]

    def _backbone_maps(self, frames: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return list(self.backbone[0].body(frames.flatten(0, 1), clip_frames=frames.shape[1]))

    def _project(self, maps: list[Tensor]) -> list[Tensor]:
        """Backbone maps at strides 4 to 32 -> projected maps (N,C,h,w) at strides 8 to 64 (the last from stride 32)."""
        return [project(item) for project, item in zip(self.input_proj, (*maps[1:], maps[3]), strict=True)]

    def _fuse(self, maps: Tensor, text: TextFeatures) -> Tensor:
        """Multiply maps (B,T,C,h,w) with what their pixels find in the words."""
        t, h, w = maps.shape[1], *maps.shape[3:]
        pixels = maps.permute(0, 1, 3, 4, 2).flatten(1, 3)
        places = sine_positions_1d(text.word_mask, self.hidden)
        pixels = self.fusion_module(pixels, text.words, places, text.word_mask)
        return pixels.unflatten(1, (t, h, w)).permute(0, 1, 4, 2, 3)

    def _queries(self, sentence: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Content (N,Q,C) of the queries, and their anchor logits (Q,4) or positions (Q,C) (3.6)."""
        n = len(sentence) * frames
        if not self.use_dab:
            content = sentence.repeat_interleave(frames, 0)[:, None].expand(-1, self.queries, -1)
            return content, self.query_embed.weight
        content, anchors = self.tgt_embed.weight, self.refpoint_embed.weight
        if self.num_patterns:
            content = (self.patterns_embed.weight[:, None] + content).flatten(0, 1)
            anchors = anchors.repeat(self.num_patterns, 1)
        return content.expand(n, -1, -1), anchors

    def _pixel_features(self, maps: QueryMaps, decoded: Decoded, text: TextFeatures) -> Tensor:
        """Mask features (N,C,h,w) at stride 4 (3.8)."""
        inputs = [maps.stride4, *decoded.memory[:3]]
        places = sine_positions_1d(text.word_mask, self.hidden)
        return self.pixel_decoder(inputs, maps.masks[:4], maps.positions[:4], text.words, places, text.word_mask)

    def _predict(self, decoded: Decoded, features: Tensor, sizes: Tensor, auxiliary: bool) -> list[dict[str, Tensor]]:
        """Logits, boxes and masks (N,Q,...) of every decoder layer, or of the last alone (3.7, 3.9)."""
        count = len(decoded.states)
        wanted = range(count) if auxiliary else range(count - 1, count)
        starts = [decoded.initial, *decoded.boxes]
        masks = layer_masks(
            features,
            self.controller(decoded.states[wanted[0] :]),
            decoded.boxes[wanted[0] :],
            sizes,
            self.mask_channels,
        )
        return [
            {
                "pred_logits": self.class_embed[index](decoded.states[index]).float(),
                "pred_boxes": refine(self.bbox_embed[index](decoded.states[index]), starts[index]),
                "pred_masks": mask,
            }
            for index, mask in zip(wanted, masks, strict=True)
        ]


def _projections(channels: tuple[int, int, int, int], hidden: int) -> nn.ModuleList:
    """1x1 convolutions for strides 8, 16 and 32 and a strided 3x3 one for stride 64, each with group norm."""
    convolutions = [nn.Conv2d(width, hidden, 1) for width in channels[1:]]
    convolutions.append(nn.Conv2d(channels[-1], hidden, 3, stride=2, padding=1))
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(nn.Sequential(convolution, nn.GroupNorm(32, hidden)) for convolution in convolutions)
