"""ReferFormer behind `adapt` and `predict`: by itself it takes nothing from a support."""

from __future__ import annotations

import torch
from torch import Tensor

from fewref.episodes.types import Query
from fewref.methods.base import MethodInfo
from fewref.methods.layers.query_net import QueryMaps
from fewref.methods.query_inference import ClipAnswer, answer_clip
from fewref.methods.query_method import SentenceMethod
from fewref.methods.referformer.net import ReferFormerNet


class ReferFormer(SentenceMethod):
    """The sentence becomes the queries; the support is used by adaptation strategies alone."""

    info = MethodInfo(
        name="referformer",
        summary="sentence as object queries of a deformable transformer; no support of its own",
        uses_support=False,
        needs_weights=True,
        paper="Language as Queries for Referring Video Object Segmentation (CVPR 2022)",
        source="wjn922/ReferFormer",
        licence="Apache-2.0",
    )
    net_class = ReferFormerNet
    family = "referformer"

    @torch.inference_mode()
    def answer(self, query: Query) -> ClipAnswer:
        """Mask logits of every frame, the network query chosen per window."""
        text = self.encode_text(query.text)

        def ask(maps: QueryMaps, sizes: Tensor) -> dict:
            return self.network(maps, None, sizes, text, auxiliary=False)

        with self.autocast():
            return answer_clip(self.network, query.frames, ask, chunk=self.window, short_side=self.short_side)
