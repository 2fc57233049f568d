"""The network of CMA and of its two ablations: a clip, a sentence and an annotated support clip to boxes and masks.

"Learning Cross-Modal Affinity for Referring Video Object Segmentation Targeting Limited Samples" (ICCV 2023);
upstream hengliusky/Few_shot_RVOS. Numbers in comments are sections of the CMA specification. Every item of a
batch has a support of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewref.episodes.errors import InputError, near
from fewref.kernels.dispatch import plain
from fewref.methods.batch import Batch
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
from fewref.methods.layers.pixels import normalise_padded
from fewref.methods.layers.query_net import QueryMaps, QueryNet
from fewref.methods.text import TextFeatures


class CMANet(QueryNet):
    """CMA ("cma"), self affinity only ("self"), or no affinity ("base").

    parts: arguments of `QueryNet`. support_gain: factor of the support's fresh weights, which then begin as those of
    the query; 0 leaves them random, as upstream, which suits a start from another checkpoint. watch_affinity: in train
    mode the output has `affinity`, how much each query token attends to the object in the support, for a loss on it.
    Raises InputError for an unknown variant.
    """

    def __init__(
        self,
        *,
        variant: str = "cma",
        hidden: int = 256,
        dropout: float = 0.1,
        support_gain: float = 0.0,
        watch_affinity: bool = False,
        **parts: Any,
    ) -> None:
        super().__init__(hidden=hidden, dropout=dropout, **parts)
        if variant not in VARIANTS:
            raise InputError(f"unknown CMA variant {variant!r}: {near(variant, VARIANTS)}")
        self.variant, self.watch_affinity = variant, watch_affinity and variant == "cma"
        self.support_qkv = QKV(hidden, hidden // 2)
        self.query_qkv = QKV(hidden, hidden // 2)
        self.conv_q = nn.Conv2d(hidden, hidden // 2, 1)
        self.layer_norm = nn.LayerNorm(hidden // 2)
        self.dropout = nn.Dropout(dropout)
        if support_gain:
            self._make_similarity(support_gain)

    def _make_similarity(self, gain: float) -> None:
        """Let attention to the support begin as a similarity that is seen beside the query's normalised features."""
        self.support_qkv.Key.load_state_dict(self.query_qkv.query.state_dict())
        with torch.no_grad():
            self.support_qkv.Key.weight.mul_(gain)
            self.support_qkv.Value.weight.mul_(gain)

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
        if only_middle and not self.backbone[0].body.temporal and not plain():
            frames, s = frames[:, middle], 1
        maps = [item.unflatten(0, (b, s)) for item in self.backbone_maps(frames)]
        if only_middle and s > 1:
            maps, s = [item[:, middle] for item in maps], 1
        projected = self.project([item.flatten(0, 1) for item in maps])
        projected = [support_transform(item) for item in projected[:3]] + projected[3:]  # not at stride 64 (3.4)
        fused = [self.fuse(item.unflatten(0, (b, s)), text) for item in projected]
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
        chosen: bool = False,
    ) -> dict:
        """Boxes and masks of every query in every frame (3.10).

        query and padding as for `encode_query`, or its result (padding is then not read). Returns what
        `QueryNet.answer` does; in train mode with `watch_affinity` also affinity, per level (B,T,h,w) in [0,1].
        Raises ValueError where a prepared support belongs to other sizes.
        """
        maps = query if isinstance(query, QueryMaps) else self.encode_query(query, padding)
        if isinstance(support, SupportFeatures):
            support = self.prepare_support(support, maps.shapes)
        elif support.shapes != maps.shapes:
            raise ValueError(f"support prepared for {support.shapes}, but the query has {maps.shapes}")
        attention: list[Tensor] | None = [] if self.watch_affinity and self.training else None
        decoded = self.transformer(
            self.affinity([self.fuse(item, text) for item in maps.projected], support, attention),
            maps.masks[1:],
            maps.positions[1:],
            *self.object_queries(text.sentence, maps.projected[0].shape[1]),
        )
        output = self.answer(maps, decoded, text, sizes, chosen)
        if attention is not None:
            output["affinity"] = attention
        return output

    def episode(self, batch: Batch) -> dict:
        """Outputs for the query clips of a batch, each under its own support."""
        frames = normalise_padded(batch.frames, batch.padding)
        support_frames = normalise_padded(batch.support_frames, batch.support_padding)
        support_text = self.encode_text(batch.support_ids, batch.support_attention)
        support = self.encode_support(support_frames, batch.support_padding, batch.support_masks, support_text)
        return self(frames, batch.padding, batch.sizes, self.encode_text(batch.ids, batch.attention), support)

    def affinity(
        self, fused: list[Tensor], support: PreparedSupport, attention: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Fused query maps, four of (B,T,C,h,w) -> the transformer's inputs, four of (B*T,C,h,w) (3.5).

        attention: see `rewrite_level`.
        """
        modules = (self.query_qkv, self.conv_q, self.layer_norm, self.dropout)
        levels = zip(fused, support.levels, strict=True)
        return [rewrite_level(query, level, self.variant, *modules, attention).flatten(0, 1) for query, level in levels]
