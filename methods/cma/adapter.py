"""CMA and its two ablations behind `adapt` and `predict`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewref.episodes.errors import InputError
from fewref.episodes.types import Prediction, Query, SupportSet
from fewref.methods.base import UNTRAINED, Method, MethodInfo, Trainable
from fewref.methods.cma.affinity import SupportFeatures, merge_shots
from fewref.methods.cma.build import build_network, build_tokenizer, read_config
from fewref.methods.cma.convert import TIED, load_cma, start_from
from fewref.methods.cma.inference import answer_clip, encode_shot, masks_at, masks_at_input
from fewref.methods.text import TextFeatures

PAPER = "Learning Cross-Modal Affinity for Referring Video Object Segmentation Targeting Limited Samples (ICCV 2023)"
SOURCE = "hengliusky/Few_shot_RVOS"


class CMA(Method):
    """Query features attend to the support's middle frame; the whole of the support is encoded once, in `adapt`.

    Raises InputError for an unknown configuration, a checkpoint which does not fit it, and for
    no checkpoint at all (an untrained network answers nothing).
    """

    info = MethodInfo(
        name="cma",
        summary="cross-modal affinity: DETR-like network whose query features attend to the annotated support",
        needs_weights=True,
        paper=PAPER,
        source=SOURCE,
        licence="upstream grants none; this is written from its description",
    )
    variant = "cma"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.weights is None:
            raise InputError(f"method {self.info.name} needs a checkpoint; give --weights FILE or {UNTRAINED}")
        settings = read_config(self.config)
        self._short_side, self._tokenizer = settings.short_side, build_tokenizer(settings)
        torch.manual_seed(self.seed)
        self._net = build_network(settings, self.variant).eval()
        if self.weights != UNTRAINED:
            load_cma(self._net, Path(self.weights))
        self._net.to(self.device)
        self._support: SupportFeatures | None = None
        self._support_frames = 0
        self._prepared: dict = {}

    def adapt(self, support: SupportSet) -> None:
        """Encode every shot: frames uint8 (T,3,H,W), masks bool (T,H,W) and sentence."""
        with self._autocast():
            shots = [
                encode_shot(self._net, shot.frames, shot.masks, self._text(shot.expression.text), self._short_side)
                for shot in support.shots
            ]
        self._support, self._prepared = merge_shots(shots), {}
        self._support_frames = min(len(shot.frames) for shot in support.shots)

    def predict(self, query: Query) -> Prediction:
        """Masks bool (T,H,W) at the original size and at the network's; confidence of the chosen network queries."""
        size = query.frames.shape[-2:]
        with self._autocast():
            answer = answer_clip(
                self._net,
                query.frames,
                self._text(query.text),
                self._support,
                prepared=self._prepared,
                chunk=self._chunk(),
                short_side=self._short_side,
            )
        masks, at_input = masks_at(answer.prob, size), masks_at_input(answer.prob)
        return Prediction(query.id, masks.cpu().numpy(), answer.confidence, at_input.cpu().numpy())

    def parameters(self) -> int:
        """Number of weights, frozen ones included."""
        return sum(parameter.numel() for parameter in self._net.parameters())

    @classmethod
    def trainable(cls, config: str, init: Path | None = None) -> Trainable:
        """The network of this variant; `init`: a checkpoint of CMA or, as upstream starts from, of ReferFormer."""
        settings = read_config(config)
        network = build_network(settings, cls.variant)
        if init:
            start_from(network, init)
        options = {**settings.train, **(settings.train_from if init else {})}
        return Trainable(network, build_tokenizer(settings), options, TIED)

    def _chunk(self) -> int:
        return self.window

    @torch.inference_mode()
    def _text(self, sentence: str) -> TextFeatures:
        ids, attention = self._tokenizer([sentence])
        return self._net.encode_text(ids.to(self.device), attention.to(self.device))

    def _autocast(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")


class CMASelf(CMA):
    """The query clip attends to its own middle frame alone; the support's foreground is added frame by frame.

    A window has at most as many frames as the support, since frames are paired.
    """

    info = replace(CMA.info, name="cma-self", summary="CMA's ablation: affinity within the query clip only")
    variant = "self"

    def _chunk(self) -> int:
        return min(self.window, self._support_frames)


class CMABase(CMASelf):
    """No affinity: the support's foreground is added to the query's features frame by frame."""

    info = replace(CMA.info, name="cma-base", summary="CMA's ablation: no affinity")
    variant = "base"
