"""The contract every method fulfils: `adapt` to a support set, then `predict` each query."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewref.episodes.errors import InputError
from fewref.episodes.types import Prediction, Query, Shot, SupportSet

if TYPE_CHECKING:
    from torch import Tensor, nn

UNTRAINED = "untrained"


@dataclass(frozen=True)
class MethodInfo:
    """What a method says of itself; `describe` prints it and tables mark `sees_truth`."""

    name: str
    summary: str
    kind: str = "method"  # "method" or "control"
    sees_truth: bool = False
    uses_text: bool = True
    uses_support: bool = True
    needs_weights: bool = False
    paper: str = ""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class TrainingSetup:
    """What training a method takes: network (a torch module with fresh weights, as `fewref.benchmark.train` calls it),
    tokenizer (sentences -> ids, attention), options (fields of `TrainOptions`), tied (for `save_checkpoint`)."""

    network: Any
    tokenizer: Callable
    options: Mapping[str, Any]
    tied: tuple = ()


class Method(abc.ABC):
    """Base of all methods. One object serves many episodes, one after the other.

    Every method is built with these keyword arguments and no others; a subclass may ignore what it has no use for.
    weights: checkpoint file, "untrained" for fresh weights drawn from `seed`, or None where a method has none;
    config: "tiny", "paper" or a file; device: a torch device name; precision: "fp32" or "bf16"; window: frames
    the network sees at once; seed: of any randomness, equal seeds give equal predictions; batch: windows of a clip that
    go through the network together; compile: use torch.compile. Both change answers by float rounding alone.
    """

    info: MethodInfo

    def __init__(
        self,
        *,
        weights: Path | str | None = None,
        config: str = "tiny",
        device: str = "cpu",
        precision: str = "fp32",
        window: int = 10,
        seed: int = 0,
        batch: int = 1,
        compile: bool = False,
    ) -> None:
        self.weights, self.config, self.device = weights, config, device
        self.precision, self.window, self.seed = precision, window, seed
        self.batch, self.compile = batch, compile

    @abc.abstractmethod
    def adapt(self, support: SupportSet) -> None:
        """Take in a support set (pixels loaded). Whatever an earlier call left is forgotten.

        Masks may be empty and texts "" (support ablations); shots are at least one.
        """

    @abc.abstractmethod
    def predict(self, query: Query) -> Prediction:
        """Answer one query (pixels loaded) under the support of the last `adapt`; changes nothing for the next one."""

    def predict_clip(self, queries: Sequence[Query]) -> list[Prediction]:
        """Answer several sentences about one clip, at least one: all queries have the same `clip` and share one array
        of frames, which is to be left as it is. The answers are bit for bit those of `predict`, in the order asked.

        Worth defining where something of a clip serves all of its sentences; nothing random may be drawn then, and no
        method that `sees_truth` is called. Where `shares_clips` is false, queries are asked one by one.
        """
        return [self.predict(query) for query in queries]

    @property
    def shares_clips(self) -> bool:
        """Whether `predict_clip` is a definition of its own, for the very `predict` that the method has."""
        definer = next(cls for cls in type(self).__mro__ if not {"predict", "predict_clip"}.isdisjoint(vars(cls)))
        return definer is not Method and "predict_clip" in vars(definer)

    def forget(self) -> None:
        """Drop what the last `adapt` left, changed weights too; called when an episode is over, also after an error."""
        return

    def parameters(self) -> int:
        """Number of weights of the network, 0 without one."""
        return 0

    @classmethod
    def training(cls, config: str, init: Path | None = None) -> TrainingSetup:
        """The parts to train, weights drawn from torch's global generator or, where they fit, taken from `init`.

        Raises InputError where a method has no training.
        """
        raise InputError(f"method {cls.info.name} cannot be trained; choose one with weights (see `list`)")

    def reveal(self, masks: np.ndarray) -> None:
        """The truth of the next query, bool (T,H,W); called only for methods that declare `sees_truth`."""
        raise TypeError(f"{self.info.name} does not declare sees_truth")


class Trainable(Method):
    """A method that can compute its own training loss, so that every adaptation strategy works around it.

    network: what `loss`, `features`, `probabilities` and `predict` use; another of the same form may be put in its
    place. roles: role ("backbone", "text", "head") -> prefixes of parameter names; what has no role is "trunk".
    adapt_defaults: strategy -> fields of `AdaptOptions`, from the configuration.
    """

    network: nn.Module
    roles: Mapping[str, tuple[str, ...]]
    adapt_defaults: Mapping[str, Mapping[str, Any]]

    @abc.abstractmethod
    def loss(self, target: Shot, memory: Sequence[Shot]) -> Tensor:
        """The training loss () float32 of one annotated clip, with the network in the mode it is in.

        target, memory: frames uint8 (T,3,H,W), masks bool (T,H,W) and sentence. memory: support clips, at least one,
        that a method with a support memory looks at; others have no use for it.
        """

    @abc.abstractmethod
    def features(self, frames: np.ndarray) -> Tensor:
        """Visual features float (T,C,h,w), without the sentence, of frames uint8 (T,3,H,W)."""

    @abc.abstractmethod
    def probabilities(self, query: Query) -> tuple[Tensor, float]:
        """Foreground probability float32 (T,H,W) at the original size, and the confidence of the answer in [0,1]."""
