"""The network of TF2: ReferFormer, whose queries first look at the previous frame with all but the object blacked out.

"Tracking-forced Referring Video Object Segmentation" (ACM Multimedia 2024); upstream `jsjei/TF2`. Numbers in comments
are sections of the TF2 specification. There is no parameter that ReferFormer does not have, and none is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewref.methods.batch import Batch
from fewref.methods.layers.backbone import freeze_first_stage
from fewref.methods.layers.deformable_decoder import Memory
from fewref.methods.layers.pixels import normalise_padded
from fewref.methods.layers.query_net import QueryMaps, QueryNet
from fewref.methods.text import TextFeatures


@dataclass
class Stream:
    """Images fused with a sentence and encoded: maps, the encoder's memory, and its valid ratios float32 (N,4,2)."""

    maps: QueryMaps
    memory: Memory
    valid_ratios: Tensor


class TF2Net(QueryNet):
    """ReferFormer's network with a second image stream. parts: arguments of `QueryNet`; there are no anchor boxes.
    freeze_stem: of a ResNet, train the last three stages alone, as upstream."""

    classify_valid = True

    def __init__(self, *, freeze_stem: bool = True, freeze_backbone: bool = False, **parts: Any) -> None:
        super().__init__(use_dab=False, freeze_backbone=freeze_backbone, **parts)
        if freeze_stem:
            freeze_first_stage(self.backbone[0].body)

    def encode_stream(self, frames: Tensor, padding: Tensor, text: TextFeatures) -> Stream:
        """frames float (B,T,3,H,W), normalised, zero on padding; padding bool (B,T,H,W). The same for both streams."""
        maps = self.encode_query(frames, padding)
        fused = [self.fuse(item, text).flatten(0, 1) for item in maps.projected]
        memory, valid_ratios = self.transformer.encode(fused, maps.masks[1:], maps.positions[1:])
        return Stream(maps, memory, valid_ratios)

    def decode(
        self,
        current: Stream,
        sizes: Tensor,
        text: TextFeatures,
        tracking: Stream | None,
        chosen: bool = False,
    ) -> dict:
        """Boxes and masks as `QueryNet.answer` returns them; without a tracking stream those of ReferFormer.

        References are scaled by the valid ratios of the current frames in both streams (2, step 5).
        """
        frames = current.maps.projected[0].shape[1]
        memory = None if tracking is None else tracking.memory
        queries = self.object_queries(text.sentence, frames)
        decoded = self.transformer.decode(current.memory, current.valid_ratios, *queries, memory)
        return self.answer(current.maps, decoded, text, sizes, chosen)

    def forward(
        self,
        frames: Tensor,
        padding: Tensor,
        sizes: Tensor,
        text: TextFeatures,
        tracking: Tensor | None,
        tracking_padding: Tensor | None,
        chosen: bool = False,
    ) -> dict:
        """frames and tracking images float (B,T,3,H,W), normalised, each with its own H, W and padding bool (B,T,H,W);
        sizes int (B,2), the unpadded (H,W) of the frames. Returns what `decode` does."""
        current = self.encode_stream(frames, padding, text)
        earlier = None if tracking is None else self.encode_stream(tracking, tracking_padding, text)
        return self.decode(current, sizes, text, earlier, chosen)

    def episode(self, batch: Batch) -> dict:
        """Outputs for the clips of a batch; those of ReferFormer where it has no tracking images."""
        frames = normalise_padded(batch.frames, batch.padding)
        tracking = batch.tracking
        if tracking is not None:
            tracking = normalise_padded(tracking, batch.tracking_padding)
        text = self.encode_text(batch.ids, batch.attention)
        return self(frames, batch.padding, batch.sizes, text, tracking, batch.tracking_padding)
