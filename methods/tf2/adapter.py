"""TF2 behind `adapt` and `predict`: by itself it takes nothing from a support."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fewref.episodes.types import Query, Shot
from fewref.methods.base import MethodInfo
from fewref.methods.batch import Batch, with_tracking
from fewref.methods.query_method import QueryMethod
from fewref.methods.tf2.inference import TrackedClip, answer_clip
from fewref.methods.tf2.net import TF2Net
from fewref.methods.tf2.pairing import keep_object, neighbours


class TF2(QueryMethod):
    """Tracks from a key frame, which the same weights find as ReferFormer; adaptation strategies use the support.

    A checkpoint of ReferFormer fits, too. Sentences of one clip are asked one by one: fusion and encoder, most of what
    a frame costs, depend on the sentence, and the rest would have to be held for the whole clip.
    """

    info = MethodInfo(
        name="tf2",
        summary="ReferFormer that is shown the previous frame's object, from a key frame on; no support of its own",
        uses_support=False,
        needs_weights=True,
        paper="Tracking-forced Referring Video Object Segmentation (ACM Multimedia 2024)",
        source="jsjei/TF2",
        licence="Apache-2.0",
    )
    net_class = TF2Net
    family = "tf2"
    mode = "full"

    def answer(self, query: Query) -> TrackedClip:
        """Mask logits and scores of every frame."""
        with torch.inference_mode(), self.autocast():
            text = self.encode_text(query.text)
            options = {"mode": self.mode, "chunk": self.window, "short_side": self.short_side}
            return answer_clip(self.network, query.frames, text, **options)

    def training_batch(self, target: Shot) -> Batch:
        """The clip with a neighbour of each frame as its tracking image, the frame itself where it is the only one."""
        before = neighbours(range(len(target.frames)), len(target.frames))
        frames, masks = target.frames[before], target.masks[before]
        tracking = replace(target, frames=np.ascontiguousarray(keep_object(frames, masks)), masks=masks)
        return with_tracking(super().training_batch(target), [self.sample(tracking)])


class TF2Released(TF2):
    """The order of the authors' program: both neighbours of the key frame keep the bootstrap's masks, unused."""

    info = replace(TF2.info, name="tf2-released", summary="TF2 in the order of the released program")
    mode = "released"
