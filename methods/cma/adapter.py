"""CMA and its two ablations behind `adapt` and `predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewref.episodes.types import Prediction, Query, Shot, SupportSet
from fewref.methods.base import MethodInfo
from fewref.methods.batch import Batch
from fewref.methods.cma.affinity import SupportFeatures, merge_shots
from fewref.methods.cma.inference import (
    answer_query,
    encode_shot,
    input_probabilities,
    masks_at,
    masks_at_input,
)
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.pixels import normalise_padded
from fewref.methods.query_inference import ClipAnswer, resize
from fewref.methods.query_method import QueryMethod

PAPER = "Learning Cross-Modal Affinity for Referring Video Object Segmentation Targeting Limited Samples (ICCV 2023)"
SOURCE = "hengliusky/Few_shot_RVOS"


class CMA(QueryMethod):
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

    def predict(self, query: Query) -> Prediction:
        """Masks bool (T,H,W) at the original size and at the network's; confidence of the chosen network queries."""
        answer = self._answer(query)
        prob = input_probabilities(answer)
        masks, at_input = masks_at(prob, query.frames.shape[-2:]), masks_at_input(prob)
        return Prediction(query.id, masks.cpu().numpy(), answer.confidence, at_input.cpu().numpy())

    def probabilities(self, query: Query) -> tuple[Tensor, float]:
        """As `predict`, before the masks are cut."""
        answer = self._answer(query)
        return resize(input_probabilities(answer), query.frames.shape[-2:]), answer.confidence

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

    @torch.inference_mode()
    def _answer(self, query: Query) -> ClipAnswer:
        with self.autocast():
            return answer_query(
                self.network,
                query.frames,
                self.encode_text(query.text),
                self._support,
                prepared=self._prepared,
                chunk=self._chunk(),
                short_side=self.short_side,
            )

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
