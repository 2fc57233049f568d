"""The contract every method fulfils: `adapt` to a support set, then `predict` each query."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewref.episodes.errors import InputError
from fewref.episodes.types import Prediction, Query, SupportSet

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
class Trainable:
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
    the network sees at once; seed: of any randomness, equal seeds give equal predictions.
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
    ) -> None:
        self.weights, self.config, self.device = weights, config, device
        self.precision, self.window, self.seed = precision, window, seed

    @abc.abstractmethod
    def adapt(self, support: SupportSet) -> None:
        """Take in a support set (pixels loaded). Whatever an earlier call left is forgotten.

        Masks may be empty and texts "" (support ablations); shots are at least one.
        """

    @abc.abstractmethod
    def predict(self, query: Query) -> Prediction:
        """Answer one query (pixels loaded) under the support of the last `adapt`; changes nothing for the next one."""

    def parameters(self) -> int:
        """Number of weights of the network, 0 without one."""
        return 0

    @classmethod
    def trainable(cls, config: str, init: Path | None = None) -> Trainable:
        """The parts to train, weights drawn from torch's global generator or, where they fit, taken from `init`.

        Raises InputError where a method has no training.
        """
        raise InputError(f"method {cls.info.name} cannot be trained; choose one with weights (see `list`)")

    def reveal(self, masks: np.ndarray) -> None:
        """The truth of the next query, bool (T,H,W); called only for methods that declare `sees_truth`."""
        raise TypeError(f"{self.info.name} does not declare sees_truth")
