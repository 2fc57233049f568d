"""What the adapters of CMA, ReferFormer and TF2 share: configuration, weights, sentence, training loss, features."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewref.episodes.errors import InputError
from fewref.episodes.transforms import ClipSample, make_sample, resize_masks
from fewref.episodes.types import Prediction, Query, Shot, SupportSet
from fewref.methods.base import UNTRAINED, Trainable, TrainingSetup
from fewref.methods.batch import Batch, collate
from fewref.methods.compiling import compile_parts
from fewref.methods.layers.losses import criterion
from fewref.methods.layers.matcher import LossWeights
from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.query_net import QueryNet
from fewref.methods.network_config import NetworkConfig, build_network, build_tokenizer, read_config
from fewref.methods.query_checkpoint import TIED, load_network, start_from
from fewref.methods.query_inference import ClipAnswer, probabilities, resize_short_side
from fewref.methods.text import TextFeatures

CUT = 16  # frames whose masks are cut at once


class Answer(Protocol):
    """Mask logits float32 (T,h,w) of the chosen network queries, the network's input size (H,W), and a confidence."""

    logits: Tensor
    size: tuple[int, int]

    @property
    def confidence(self) -> float: ...


class QueryMethod(Trainable):
    """A `QueryNet` with its configuration and checkpoint. A subclass says how it answers, and how it adapts, unless it
    takes nothing from a support by itself: then only adaptation strategies use it.

    Raises InputError for an unknown configuration, a checkpoint which does not fit it, for no checkpoint at all (an
    untrained network answers nothing), and where it is to be compiled but cannot be.
    """

    network: QueryNet
    net_class: type[QueryNet]
    net_options: Mapping[str, Any] = {}
    family: str  # names the shipped configurations
    roles = {
        "backbone": ("backbone.",),
        "text": ("text_encoder.",),
        "head": ("controller.", "class_embed.", "pixel_decoder.mask_features."),
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.weights is None:
            raise InputError(f"method {self.info.name} needs a checkpoint; give --weights FILE or {UNTRAINED}")
        settings = read_config(self.family, self.config)
        self.adapt_defaults, self._loss_weights = settings.adapt, LossWeights(**settings.train.get("loss_weights", {}))
        self.short_side, self.tokenizer = settings.short_side, build_tokenizer(settings)
        torch.manual_seed(self.seed)
        self.network = self.build(settings).eval()
        if self.weights != UNTRAINED:
            load_network(self.network, Path(self.weights))
        self.network.to(self.device)
        if self.compile:
            compile_parts(self.network)

    @classmethod
    def build(cls, settings: NetworkConfig) -> QueryNet:
        """The network of a configuration, with fresh weights."""
        return build_network(settings, cls.net_class, **cls.net_options)

    @abc.abstractmethod
    def answer(self, query: Query) -> Answer:
        """What the network says of a clip."""

    def adapt(self, support: SupportSet) -> None:
        """Nothing to take in."""

    def predict(self, query: Query) -> Prediction:
        """Masks bool (T,H,W) at the original size and at the network's; confidence of the chosen network queries."""
        return self.prediction(query, self.answer(query))

    def probabilities(self, query: Query) -> tuple[Tensor, float]:
        """As `predict`, before the masks are cut."""
        answer = self.answer(query)
        return probabilities(answer.logits, query.frames.shape[-2:]), answer.confidence

    def prediction(self, query: Query, answer: Answer) -> Prediction:
        """The answer with its masks, cut some frames at a time: floats at the original size are many bytes."""
        size = query.frames.shape[-2:]
        parts = [self.cut(logits, answer.size, size) for logits in answer.logits.split(CUT)]
        masks, at_input = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        return Prediction(query.id, masks, answer.confidence, at_input)

    def cut(self, logits: Tensor, input_size: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mask logits (T,h,w) -> masks bool (T,H,W) at the original size, and at the network's."""
        at_size, at_input = (probabilities(logits, given) > 0.5 for given in (size, input_size))
        return at_size, at_input

    def parameters(self) -> int:
        """Number of weights, frozen ones included."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @classmethod
    def training(cls, config: str, init: Path | None = None) -> TrainingSetup:
        """The network of this method; `init`: a checkpoint of it or of one that shares most of its parts."""
        settings = read_config(cls.family, config)
        network = cls.build(settings)
        if init:
            start_from(network, init)
        options = {**settings.train, **(settings.train_from if init else {})}
        return TrainingSetup(network, build_tokenizer(settings), options, TIED)

    def loss(self, target: Shot, memory: Sequence[Shot]) -> Tensor:
        """The loss that the network is trained with; frames at the network's input size."""
        batch = self.training_batch(target).to(torch.device(self.device))
        with self.autocast():
            outputs = self.outputs(batch, memory)
        valid_alone = self.network.classify_valid
        return criterion(outputs, batch.targets, self._loss_weights, LossWeights(), valid_alone)[0]

    def training_batch(self, target: Shot) -> Batch:
        """What the network is trained on, of one clip."""
        return collate([(self.sample(target),)], self.tokenizer)

    def outputs(self, batch: Batch, memory: Sequence[Shot]) -> dict:
        """What the network answers in training."""
        return self.network.episode(batch)

    def sample(self, shot: Shot) -> ClipSample:
        """A shot at the network's input size, masks by nearest neighbour, with the boxes of its masks."""
        frames = resize_short_side(shot.frames, self.short_side)
        masks = resize_masks(shot.masks, frames.shape[-2:])
        return make_sample(np.ascontiguousarray(frames.transpose(0, 2, 3, 1)), masks, shot.expression.text)

    def features(self, frames: np.ndarray) -> Tensor:
        """The backbone's map at stride 8."""
        clip = normalise(torch.tensor(resize_short_side(frames, self.short_side), device=self.device))
        with self.autocast():
            return self.network.backbone_maps(clip[None])[1].float()

    def encode_text(self, sentence: str) -> TextFeatures:
        """Features of one sentence (B = 1)."""
        ids, attention = self.tokenizer([plain(sentence)])
        return self.network.encode_text(ids.to(self.device), attention.to(self.device))

    def autocast(self) -> torch.autocast:
        """bf16 where the precision says so."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16")


class ClipMethod(QueryMethod):
    """A query method that encodes the frames of a clip once for all of its sentences."""

    @abc.abstractmethod
    def answer_texts(self, frames: np.ndarray, texts: Sequence[TextFeatures]) -> list[ClipAnswer]:
        """What the network says of frames uint8 (T,3,H,W), per sentence (B = 1 each)."""

    def answer(self, query: Query) -> ClipAnswer:
        """What the network says of a clip."""
        return self._answers([query])[0]

    def predict(self, query: Query) -> Prediction:
        """Masks bool (T,H,W) at the original size and at the network's; confidence of the chosen network queries."""
        return self.predict_clip([query])[0]

    def predict_clip(self, queries: Sequence[Query]) -> list[Prediction]:
        """As `predict`, every sentence in turn."""
        answers = self._answers(queries)
        return [self.prediction(query, answer) for query, answer in zip(queries, answers, strict=True)]

    @torch.inference_mode()
    def _answers(self, queries: Sequence[Query]) -> list[ClipAnswer]:
        """Equal sentences are asked once."""
        sentences = [plain(query.text) for query in queries]
        asked = list(dict.fromkeys(sentences))
        with self.autocast():
            texts = [self.encode_text(sentence) for sentence in asked]
            answers = dict(zip(asked, self.answer_texts(queries[0].frames, texts), strict=True))
        return [answers[sentence] for sentence in sentences]


def plain(sentence: str) -> str:
    """A sentence as in training: lower case, single blanks."""
    return " ".join(sentence.lower().split())
