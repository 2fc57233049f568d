"""ReferFormer behind `adapt` and `predict`: by itself it takes nothing from a support."""

from __future__ import annotations

import torch
from torch import Tensor

from fewref.episodes.types import Prediction, Query, SupportSet
from fewref.methods.base import MethodInfo
from fewref.methods.layers.query_net import QueryMaps
from fewref.methods.query_inference import ClipAnswer, answer_clip, probabilities
from fewref.methods.query_method import QueryMethod
from fewref.methods.referformer.net import ReferFormerNet


class ReferFormer(QueryMethod):
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

    def adapt(self, support: SupportSet) -> None:
        """Nothing to take in."""

    def predict(self, query: Query) -> Prediction:
        """Masks bool (T,H,W) at the original size and at the network's; confidence of the chosen network queries."""
        answer = self._answer(query)
        masks, at_input = (
            probabilities(answer.logits, size) > 0.5 for size in (query.frames.shape[-2:], answer.size)
        )
        return Prediction(query.id, masks.cpu().numpy(), answer.confidence, at_input.cpu().numpy())

    def probabilities(self, query: Query) -> tuple[Tensor, float]:
        """As `predict`, before the masks are cut."""
        answer = self._answer(query)
        return probabilities(answer.logits, query.frames.shape[-2:]), answer.confidence

    @torch.inference_mode()
    def _answer(self, query: Query) -> ClipAnswer:
        text = self.encode_text(query.text)

        def ask(maps: QueryMaps, sizes: Tensor) -> dict:
            return self.network(maps, None, sizes, text, auxiliary=False)

        with self.autocast():
            return answer_clip(self.network, query.frames, ask, chunk=self.window, short_side=self.short_side)
