"""Several sentences about one clip: answered as one by one, with the frames encoded once, and in little memory."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewref.episodes.types import Prediction, Query
from fewref.methods.adaptation.adapted import wrap
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.base import UNTRAINED, Method, MethodInfo
from fewref.methods.check import make_case
from fewref.methods.cma.adapter import CMA
from fewref.methods.controls import Empty
from fewref.methods.query_inference import cut_windows
from fewref.methods.registry import load_method

SENTENCES = ("a red dog", "the cat that moves to the left", "", "A  red dog")


def questions(frames: int = 5, sentences: tuple[str, ...] = SENTENCES) -> list[Query]:
    query = make_case(0, "dog", (48, 64), frames).query
    return [replace(query, id=f"a:{number}", text=text) for number, text in enumerate(sentences)]


def built(name: str, **options) -> Method:
    method = load_method(name)(weights=UNTRAINED, **{"window": 2, **options})
    method.adapt(make_case(0, "dog", (48, 64)).support)
    return method


def assert_equal(one: Prediction, other: Prediction) -> None:
    assert one.query == other.query
    assert one.confidence == other.confidence
    np.testing.assert_array_equal(one.masks, other.masks)
    np.testing.assert_array_equal(one.input_masks, other.input_masks)


def counted(monkeypatch, thing: object, name: str) -> list:
    """The arguments of every call of a method of an object, which still does its work."""
    real, calls = getattr(thing, name), []
    monkeypatch.setattr(thing, name, lambda *given: calls.append(given) or real(*given))
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["cma", "cma-self", "referformer", "tf2"])
def test_asked_together_or_one_by_one_the_answers_are_equal(name, precision):
    method, queries = built(name, precision=precision), questions(frames=3)
    together = method.predict_clip(queries)
    assert len({answer.confidence for answer in together}) == 3
    for query, answer in zip(queries, together, strict=True):
        assert_equal(answer, method.predict(query))
    for part in (queries[1:], queries[2:], queries[::-1]):
        for answer in method.predict_clip(part):
            assert_equal(answer, next(other for other in together if other.query == answer.query))


@pytest.mark.parametrize("name", ["cma", "cma-self", "cma-base", "referformer"])
def test_windows_at_once_give_the_answers_of_one_at_a_time(name, monkeypatch):
    """Seven frames in windows of two: three full ones and a rest, which goes alone."""
    one, several = built(name), built(name, batch=2)
    calls = counted(monkeypatch, several.network, "encode_query")
    queries = questions(frames=7)[:2]
    for query in queries:
        expected, got = one.answer(query), several.answer(query)
        assert got.queries == expected.queries
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-5, atol=1e-6)
        for answer, other in zip(one.probabilities(query), several.probabilities(query), strict=True):
            torch.testing.assert_close(answer, other, rtol=1e-5, atol=1e-5)
    assert [tuple(call[0].shape[:2]) for call in calls[:3]] == [(2, 2), (1, 2), (1, 1)]
    for query, answer in zip(queries, several.predict_clip(queries), strict=True):
        assert_equal(answer, several.predict(query))


def test_how_windows_are_cut():
    assert list(cut_windows(7, 2, 2)) == [(slice(0, 4), 2), (slice(4, 6), 1), (slice(6, 7), 1)]
    assert list(cut_windows(4, 2, 9)) == [(slice(0, 4), 2)]
    assert list(cut_windows(3, 10, 4)) == [(slice(0, 3), 1)]
    assert list(cut_windows(2, 1)) == [(slice(0, 1), 1), (slice(1, 2), 1)]


@pytest.mark.parametrize("name", ["cma", "referformer"])
def test_frames_are_encoded_once_and_each_sentence_once(name, monkeypatch):
    method = built(name)
    frames = counted(monkeypatch, method.network, "encode_query")
    texts = counted(monkeypatch, method.network, "encode_text")
    method.predict_clip(questions(frames=5))
    assert [call[0].shape[1] for call in frames] == [2, 2, 1]
    assert len(texts) == 3  # two of four are equal but for case and blanks


@pytest.mark.parametrize("name", ["cma", "referformer"])
def test_no_more_than_one_window_is_held(name, monkeypatch):
    """When a window is about to be encoded, nothing of the one before is left: neither its maps nor its outputs."""
    method, held, alive = built(name), [], []
    network = method.network
    encode, answer = network.encode_query, network.answer

    def watch(made: object) -> None:
        held.append(weakref.ref(made))

    def watched_encode(*given):
        alive.append(sum(ref() is not None for ref in held))
        maps = encode(*given)
        for made in (maps, maps.stride4, *maps.projected, *maps.positions):
            watch(made)
        return maps

    def watched_answer(*given):
        output = answer(*given)
        for made in output.values():
            watch(made)
        return output

    monkeypatch.setattr(network, "encode_query", watched_encode)
    monkeypatch.setattr(network, "answer", watched_answer)
    for frames in (4, 10):
        method.predict_clip(questions(frames))
    assert len(held) > 7 * 10  # maps of seven windows, and three answers in each
    assert alive == [0] * 7


def test_what_is_kept_of_a_window_is_memory_of_its_own():
    answer = built("cma").answer(questions()[0])
    assert answer.logits.untyped_storage().nbytes() == answer.logits.numel() * 4


class Loud(CMA):
    """Overrides `predict` alone, which `predict_clip` of its base would pass by."""

    def predict(self, query):
        return super().predict(query)


class Both(Loud):
    def predict_clip(self, queries):
        return [self.predict(query) for query in queries]


class Alone(Method):
    info = MethodInfo("alone", "has its own predict_clip")

    def adapt(self, support):
        pass

    def predict(self, query):
        return self.predict_clip([query])[0]

    def predict_clip(self, queries):
        return [Prediction(query.id, np.zeros((3, 2, 2), bool)) for query in queries]


def test_who_is_asked_for_whole_clips():
    assert not Empty().shares_clips
    assert Alone().shares_clips
    shares = {name: load_method(name)(weights=UNTRAINED).shares_clips for name in ("cma", "cma-base", "referformer")}
    assert shares == dict.fromkeys(shares, True)
    assert not load_method("tf2")(weights=UNTRAINED).shares_clips
    assert [cls(weights=UNTRAINED).shares_clips for cls in (Loud, Both)] == [False, True]


@pytest.mark.parametrize(("strategy", "shares"), [("finetune", True), ("prototype", False), ("self-train", False)])
def test_strategies_pass_on_what_they_can(strategy, shares, monkeypatch):
    adapted = wrap(built("referformer"), AdaptOptions(strategy, steps=1, augment=False))
    assert adapted.shares_clips == shares
    adapted.batch = 3
    assert adapted.method.batch == 3
    adapted.adapt(make_case(0, "dog", (48, 64)).support)
    calls = counted(monkeypatch, adapted.method, "predict_clip")
    queries = questions(frames=2)[:2]
    together = adapted.predict_clip(queries)
    assert (len(calls) == 1 and len(calls[0][0]) == 2) == shares
    for query, answer in zip(queries, together, strict=True):
        assert_equal(answer, adapted.predict(query))
    assert not wrap(load_method("tf2")(weights=UNTRAINED), AdaptOptions("finetune")).shares_clips
