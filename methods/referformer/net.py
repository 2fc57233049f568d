"""The network of ReferFormer: a clip and a sentence to boxes and masks of a few object queries.

"Language as Queries for Referring Video Object Segmentation" (CVPR 2022); upstream wjn922/ReferFormer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewref.methods.batch import Batch
from fewref.methods.layers.backbone import freeze_first_stage
from fewref.methods.layers.pixels import normalise_padded
from fewref.methods.layers.query_net import QueryMaps, QueryNet
from fewref.methods.text import TextFeatures


class ReferFormerNet(QueryNet):
    """parts: arguments of `QueryNet`; there are no anchor boxes. freeze_stem: of a ResNet, train the last three stages
    alone, as upstream (ReferFormer specification 4.1)."""

    classify_valid = True

    def __init__(self, *, freeze_stem: bool = True, freeze_backbone: bool = False, **parts: Any) -> None:
        super().__init__(use_dab=False, freeze_backbone=freeze_backbone, **parts)
        if freeze_stem:
            freeze_first_stage(self.backbone[0].body)

    def forward(
        self,
        query: Tensor | QueryMaps,
        padding: Tensor | None,
        sizes: Tensor,
        text: TextFeatures,
        chosen: bool = False,
    ) -> dict:
        """Boxes and masks of every query in every frame, as `QueryNet.answer` returns them.

        query and padding as for `encode_query`, or its result (padding is then not read).
        """
        maps = query if isinstance(query, QueryMaps) else self.encode_query(query, padding)
        decoded = self.transformer(
            [self.fuse(item, text).flatten(0, 1) for item in maps.projected],
            maps.masks[1:],
            maps.positions[1:],
            *self.object_queries(text.sentence, maps.projected[0].shape[1]),
        )
        return self.answer(maps, decoded, text, sizes, chosen)

    def episode(self, batch: Batch) -> dict:
        """Outputs for the query clips of a batch; a support is not looked at."""
        frames = normalise_padded(batch.frames, batch.padding)
        return self(frames, batch.padding, batch.sizes, self.encode_text(batch.ids, batch.attention))


def annotated_frames(maps: QueryMaps, frames: Tensor) -> QueryMaps:
    """One frame of every clip, for data sets which annotate and score single frames (A2D, JHMDB).

    maps: of B clips; frames: int (B,), positions in the clips. The backbone saw whole clips, which matters for one that
    mixes frames (Video-Swin); all that follows sees clips of one frame.
    """
    b, t = maps.projected[0].shape[:2]
    clips = torch.arange(b, device=frames.device)
    flat = clips * t + frames
    return QueryMaps(
        maps.stride4[flat],
        [item[clips, frames][:, None] for item in maps.projected],
        [item[flat] for item in maps.masks],
        [item[flat] for item in maps.positions],
    )
