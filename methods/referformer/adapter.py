"""ReferFormer behind `adapt` and `predict`: by itself it takes nothing from a support."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import Tensor

from fewref.methods.base import MethodInfo
from fewref.methods.layers.query_net import QueryMaps
from fewref.methods.query_inference import ClipAnswer, answer_clip, repeat_text
from fewref.methods.query_method import ClipMethod
from fewref.methods.referformer.net import ReferFormerNet
from fewref.methods.text import TextFeatures


class ReferFormer(ClipMethod):
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

    def answer_texts(self, frames: np.ndarray, texts: Sequence[TextFeatures]) -> list[ClipAnswer]:
        """What the network says of a clip, per sentence; a network query is chosen per window."""

        def ask(text: TextFeatures, maps: QueryMaps, sizes: Tensor) -> dict:
            return self.network(maps, None, sizes, repeat_text(text, len(sizes)), chosen=True)

        asks = [partial(ask, text) for text in texts]
        options = {"chunk": self.window, "short_side": self.short_side, "batch": self.batch}
        return answer_clip(self.network, frames, asks, **options)
