"""CMA and its two ablations behind `adapt` and `predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewref.episodes.types import Query, Shot, SupportSet
from fewref.methods.base import MethodInfo
from fewref.methods.batch import Batch
from fewref.methods.cma.affinity import SupportFeatures, merge_shots
from fewref.methods.cma.inference import (
    answer_queries,
    encode_shot,
    input_probabilities,
    masks_at,
    masks_at_input,
)
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.pixels import normalise_padded
from fewref.methods.query_inference import ClipAnswer, probabilities, resize
from fewref.methods.query_method import ClipMethod
from fewref.methods.text import TextFeatures

PAPER = "Learning Cross-Modal Affinity for Referring Video Object Segmentation Targeting Limited Samples (ICCV 2023)"
SOURCE = "hengliusky/Few_shot_RVOS"


class CMA(ClipMethod):
    """Query features attend to the support's middle frame; the whole of the support is encoded once, in `adapt`."""

    info = MethodInfo(
        name="cma",
        summary="cross-modal affinity: DETR-like network whose query features attend to the annotated support",
        needs_weights=True,
        paper=PAPER,
        source=SOURCE,
        licence="upstream grants none; this is written from its description",
    )
    net_class = CMANet
    net_options = {"variant": "cma"}
    family = "cma"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.forget()

    @torch.inference_mode()
    def adapt(self, support: SupportSet) -> None:
        """Encode every shot: frames uint8 (T,3,H,W), masks bool (T,H,W) and sentence."""
        self.forget()
        with self.autocast():
            self._support = self._encode(support.shots)
        self._support_frames = min(len(shot.frames) for shot in support.shots)

    def forget(self) -> None:
        """Drop the encoded support."""
        self._support: SupportFeatures | None = None
        self._support_frames = 0
        self._prepared: dict = {}

    def probabilities(self, query: Query) -> tuple[Tensor, float]:
        """As `predict`, before the masks are cut."""
        answer = self.answer(query)
        return resize(input_probabilities(answer), query.frames.shape[-2:]), answer.confidence

    def cut(self, logits: Tensor, input_size: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mask logits (T,h,w) -> masks bool (T,H,W) at the original size, and at the network's, as CMA cuts them."""
        prob = probabilities(logits, input_size)
        return masks_at(prob, size), masks_at_input(prob)

    def outputs(self, batch: Batch, memory: Sequence[Shot]) -> dict:
        """The network's answer under the support `memory`."""
        frames = normalise_padded(batch.frames, batch.padding)
        support = self._encode(memory)
        return self.network(
            frames, batch.padding, batch.sizes, self.network.encode_text(batch.ids, batch.attention), support
        )

    def _encode(self, shots: Sequence[Shot]) -> SupportFeatures:
        texts = [self.encode_text(shot.expression.text) for shot in shots]
        return merge_shots(
            [
                encode_shot(self.network, shot.frames, shot.masks, text, self.short_side)
                for shot, text in zip(shots, texts, strict=True)
            ]
        )

    def answer_texts(self, frames: np.ndarray, texts: Sequence[TextFeatures]) -> list[ClipAnswer]:
        """What the network says of a clip under the support of the last `adapt`, per sentence."""
        options = {"chunk": self._chunk(), "short_side": self.short_side, "batch": self.batch}
        return answer_queries(self.network, frames, texts, self._support, prepared=self._prepared, **options)

    def _chunk(self) -> int:
        return self.window


class CMASelf(CMA):
    """The query clip attends to its own middle frame alone; the support's foreground is added frame by frame.

    A window has at most as many frames as the support, since frames are paired.
    """

    info = replace(CMA.info, name="cma-self", summary="CMA's ablation: affinity within the query clip only")
    net_options = {"variant": "self"}

    def _chunk(self) -> int:
        return min(self.window, self._support_frames)


class CMABase(CMASelf):
    """No affinity: the support's foreground is added to the query's features frame by frame."""

    info = replace(CMA.info, name="cma-base", summary="CMA's ablation: no affinity")
    net_options = {"variant": "base"}
