"""Any trainable method with an adaptation strategy around it, itself a method."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fewref.episodes.errors import InputError
from fewref.episodes.types import Prediction, Query, Shot, SupportSet, canonical_json
from fewref.methods.adaptation import prototype
from fewref.methods.adaptation.finetune import finetune, trained_parameters
from fewref.methods.adaptation.meta import adapting, check, meta_adapt
from fewref.methods.adaptation.options import META, TRANSDUCTIVE, AdaptOptions
from fewref.methods.adaptation.record import AdaptationError, AdaptationRecord
from fewref.methods.adaptation.restore import Keeper, own_generators
from fewref.methods.adaptation.self_train import self_train
from fewref.methods.adaptation.support import check_visible, tasks
from fewref.methods.base import Method, Trainable

__all__ = ["AdaptationError", "AdaptationRecord", "Adapted", "wrap"]


def wrap(method: Method, options: AdaptOptions) -> Method:
    """The method with a strategy around it; itself for "none".

    Raises InputError where the method has no training loss or none of the weights that the strategy would train, and
    where what the strategy needs is missing (a library, learned rates).
    """
    return method if options.strategy == "none" else Adapted(method, options)


class Adapted(Method):
    """Adapts a trainable method's weights, or pools prototypes of its features, anew in each episode.

    After `forget`, and after any exception, the method is bit for bit what it was; `adapt` begins with that too. What
    happens depends on the seed, the strategy and the clips of the episode alone, and leaves the global generators
    where they were. record: of the last adaptation. names: the weights that the strategy may change.
    """

    def __init__(self, method: Method, options: AdaptOptions) -> None:
        strategy = options.strategy
        if not isinstance(method, Trainable):
            raise InputError(f"--adapt {strategy}: method {method.info.name} has no training loss; use --adapt none")
        self.method, self.options, self.strategy = method, options, strategy
        super().__init__(
            weights=method.weights,
            config=method.config,
            device=method.device,
            precision=method.precision,
            window=method.window,
            seed=method.seed,
            batch=method.batch,
            compile=method.compile,
        )
        self.transductive = strategy in TRANSDUCTIVE
        text_free = strategy == "prototype"
        self.info = dataclasses.replace(
            method.info, uses_support=True, uses_text=method.info.uses_text and not text_free
        )
        chosen = {} if text_free else changing(method, options)
        self.names, self._sizes = tuple(chosen), sum(weight.numel() for weight in chosen.values())
        self.record = AdaptationRecord()
        self._network = method.network
        self._keeper: Keeper | None = None
        self._support: SupportSet | None = None
        self._prototypes: prototype.Prototypes | None = None

    @property
    def window(self) -> int:
        """Frames at once, which is the method's."""
        return self.method.window

    @window.setter
    def window(self, frames: int) -> None:
        self.method.window = frames

    @property
    def batch(self) -> int:
        """Windows at once, which is the method's."""
        return self.method.batch

    @batch.setter
    def batch(self, windows: int) -> None:
        self.method.batch = windows

    def parameters(self) -> int:
        """Number of weights of the method's network."""
        return self.method.parameters()

    def adapt(self, support: SupportSet) -> None:
        """Apply the strategy to the support, then let the method take it in.

        Raises AdaptationError for a support that never shows its object and for a loss that is not finite.
        """
        self.forget()
        check_visible(support.shots)
        if self.transductive:
            self._support = support  # the rest waits for the query
            return
        with self._undone_on_error(), self._own_generators(support, ()):
            if self.strategy == "prototype":
                self._timed(lambda: self._pool(support))
            else:
                self._keeper = Keeper(self._network)
                self._timed(lambda: self._learn(support))
                self._keeper.restore_flags()
                self.method.adapt(support)

    def predict(self, query: Query) -> Prediction:
        """The method's answer with the weights, or by the prototypes, of the last `adapt`.

        A transductive strategy adapts here, to the support and to this query's frames, and restores the weights.
        """
        if self.transductive:
            return self._predict_transductive(query)
        if self.strategy == "prototype":
            return prototype.answer(self.method, self._prototypes, query, self.options.temperature)
        return self.method.predict(query)

    def predict_clip(self, queries: Sequence[Query]) -> list[Prediction]:
        """As the method does it where the strategy has no part in its answers, else one query after another."""
        return self.method.predict_clip(queries) if self.shares_clips else super().predict_clip(queries)

    @property
    def shares_clips(self) -> bool:
        """Whether the method does, and the strategy is neither transductive nor the prototypes."""
        return self.method.shares_clips and not self.transductive and self.strategy != "prototype"

    def forget(self) -> None:
        """Bring the method back to what it was before the episode."""
        self.method.network = self._network
        if self._keeper is not None:
            self._keeper.restore()
        self._keeper = self._support = self._prototypes = None
        self.record = AdaptationRecord()
        self.method.forget()

    def _pool(self, support: SupportSet) -> AdaptationRecord:
        self._prototypes = prototype.prototypes(self.method, support.shots)
        return AdaptationRecord()

    def _learn(self, support: SupportSet) -> AdaptationRecord:
        task = self._tasks(support.shots)
        if self.strategy not in META:
            return finetune(self.method, self.options, task)
        losses: list[float] = []
        self.method.network = meta_adapt(self.method, self.options, task, losses=losses)
        return AdaptationRecord(self.options.steps, self._sizes, losses=tuple(losses))

    def _predict_transductive(self, query: Query) -> Prediction:
        support = self._support
        with Keeper(self._network) as keeper, self._own_generators(support, (query,)):
            task = self._tasks(support.shots)
            self._timed(lambda: self_train(self.method, support, query, self.options, task, self.seed))
            keeper.restore_flags()
            self.method.adapt(support)
            prediction = self.method.predict(query)
        self.method.forget()
        return prediction

    def _tasks(self, shots: Sequence[Shot]) -> Callable[[int], tuple[Shot, list[Shot]]]:
        return tasks(shots, self.options, self.seed, memory=self.method.info.uses_support)

    def _timed(self, learn: Callable[[], AdaptationRecord]) -> None:
        start = time.perf_counter()
        record = learn()
        self.record = dataclasses.replace(record, seconds=time.perf_counter() - start)

    def _own_generators(self, support: SupportSet, queries: Sequence[Query]) -> Any:
        asked = [[*_names(shot), shot.expression.text] for shot in support.shots]
        asked += [[*_names(query), query.text] for query in queries]
        return own_generators(canonical_json([self.seed, self.strategy, asked]), self.device)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.forget()
            raise


def changing(method: Trainable, options: AdaptOptions) -> dict[str, nn.Parameter]:
    """The weights that a gradient strategy may change, by name. Raises InputError where it cannot work."""
    if options.strategy not in META:
        return trained_parameters(method, options)
    check(method, options)
    return adapting(method, options)


def _names(item: Shot | Query) -> tuple[object, ...]:
    return item.clip.dataset, item.clip.video, *item.clip.frames
