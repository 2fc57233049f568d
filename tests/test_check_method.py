"""The checks pass for good methods, and for each rule a method that breaks it, and only it, fails."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fewref.episodes.errors import InputError
from fewref.episodes.types import Prediction
from fewref.methods.base import Method, MethodInfo
from fewref.methods.check import check_method, make_case
from fewref.methods.controls import CopySupport, Empty, Oracle, Random


class Good(Method):
    """Marks what is brighter than the support's background."""

    info = MethodInfo("good", "brighter than the background of the support")

    def adapt(self, support):
        self.level = max((int(shot.frames.max(axis=1)[~shot.masks].max()) for shot in support.shots), default=0)

    def predict(self, query):
        return Prediction(query.id, query.frames.max(axis=1) > self.level, 0.5)


def failed(cls: type[Method], **options) -> list[str]:
    return [check.name for check in check_method(cls, **options) if not check.passed]


@pytest.mark.parametrize("cls", [Good, Empty, Random, CopySupport, Oracle])
def test_good_methods_pass(cls):
    assert [check for check in check_method(cls) if not check.passed] == []


class WrongSize(Good):
    def predict(self, query):
        return dataclasses.replace(super().predict(query), masks=np.zeros((len(query.frames), 48, 64), bool))


class Floats(Good):
    def predict(self, query):
        answer = super().predict(query)
        return dataclasses.replace(answer, masks=answer.masks.astype(np.float32))


class InputMasksOfOneFrame(Good):
    def predict(self, query):
        return dataclasses.replace(super().predict(query), input_masks=np.zeros((1, 4, 4), bool))


class TooSure(Good):
    def predict(self, query):
        return dataclasses.replace(super().predict(query), confidence=1.5)


class OtherQuery(Good):
    def predict(self, query):
        return dataclasses.replace(super().predict(query), query="other")


class Unsteady(Good):
    def predict(self, query):
        masks = np.random.default_rng().random((len(query.frames), *query.frames.shape[2:])) > 0.5
        return Prediction(query.id, masks)


class Scribbler(Good):
    def predict(self, query):
        answer = super().predict(query)
        query.frames[0, 0, 0, 0] ^= 255
        return answer


class Peeper(Good):
    def predict(self, query):
        getattr(query, "masks", None)
        return super().predict(query)


class Hoarder(Good):
    def adapt(self, support):
        super().adapt(support)
        self.seen = (*getattr(self, "seen", ()), self.level)
        self.level = sum(self.seen)


class Drifter(Good):
    def predict(self, query):
        answer = super().predict(query)
        self.level = 255
        return answer


class Secret(Good):
    def reveal(self, masks):
        self.truth = masks


class NeedsForeground(Good):
    def adapt(self, support):
        if not all(shot.masks.any() for shot in support.shots):
            raise ValueError("no foreground")
        super().adapt(support)


class WindowBound(Good):
    def predict(self, query):
        masks = super().predict(query).masks[: self.window]
        return Prediction(query.id, masks)


class FirstOnly(Good):
    def predict(self, query):
        return super().predict(query)

    def predict_clip(self, queries):
        answer = self.predict(queries[0])
        return [dataclasses.replace(answer, query=query.id, confidence=1 / len(query.text)) for query in queries]


BROKEN = [
    (Floats, "masks: bool, one per frame, at the original size"),
    (WrongSize, "an odd size, unlike the support's"),
    (InputMasksOfOneFrame, "input masks: none, or bool and one per frame"),
    (TooSure, "confidence: a number in [0,1]"),
    (OtherQuery, "answers with a Prediction of this query"),
    (Unsteady, "equal seeds give equal answers"),
    (Scribbler, "inputs are left as they were"),
    (Peeper, "reads of a query its id, clip, text and frames alone"),
    (Hoarder, "a second adapt forgets the first"),
    (Drifter, "predict does not change the state"),
    (Secret, "asks for the truth only if it says so"),
    (NeedsForeground, "empty support masks and no sentence"),
    (WindowBound, "a clip longer than the window"),
    (FirstOnly, "sentences asked together get the answers that they get alone"),
]


@pytest.mark.parametrize(("cls", "rule"), BROKEN, ids=[cls.__name__ for cls, _ in BROKEN])
def test_each_rule_is_enforced(cls, rule):
    assert rule in failed(cls)


def test_every_rule_but_shapes_has_a_breaker():
    rules = {check.name for check in check_method(Good)}
    shapes = {name for name in rules if name.startswith(("a clip of one", "supports of", "no sentence", "info"))}
    assert rules - shapes == {rule for _, rule in BROKEN}


def test_what_cannot_be_built_ends_the_table():
    class Picky(Good):
        def __init__(self, **options):
            raise RuntimeError("not\ntoday")

    (check,) = check_method(Picky)
    assert (check.passed, check.detail) == (False, "RuntimeError: not today")


def test_input_errors_are_the_users():
    class NoWeights(Good):
        def __init__(self, **options):
            raise InputError("no such checkpoint")

    with pytest.raises(InputError, match="no such checkpoint"):
        check_method(NoWeights)


def test_cases_are_repeatable_and_show_something():
    case, again = make_case(0, "dog", (41, 57)), make_case(0, "dog", (41, 57))
    assert np.array_equal(case.query.frames, again.query.frames)
    assert case.query.frames.shape == (4, 3, 41, 57)
    assert case.truth.any(axis=(1, 2)).all()
    assert not np.array_equal(case.truth[0], case.truth[-1])
