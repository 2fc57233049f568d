"""Every strategy around the networks that we have, untrained and tiny."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from toy_trainable import state

from fewref.methods.adaptation.adapted import wrap
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.base import UNTRAINED, Trainable
from fewref.methods.check import make_case
from fewref.methods.registry import METHODS, load_method

TRAINABLE = [name for name in METHODS if issubclass(load_method(name), Trainable)]
NETWORKS = ["cma", "cma-base", "referformer", "tf2"]
STRATEGIES = ["finetune", "head", "prototype", "self-train"]
STRATEGIES += ["maml", "anil"] if importlib.util.find_spec("learn2learn") else []
CASE = make_case(0, "dog", (48, 64), frames=2)


@pytest.fixture(scope="module")
def methods():
    made = {}

    def get(name):
        if name not in made:
            made[name] = load_method(name)(weights=UNTRAINED, window=3)
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("cma", strategy) for strategy in STRATEGIES]
    + [(name, strategy) for name in NETWORKS[1:] for strategy in ("finetune", "prototype", "self-train")],
)
def test_it_adapts_answers_and_comes_back(methods, name, strategy):
    method = methods(name)
    before, drawn = state(method), torch.get_rng_state()
    adapted = wrap(method, AdaptOptions(strategy, steps=2, lr=1e-3))
    adapted.adapt(CASE.support)
    changed = state(method) != before
    answers = [adapted.predict(CASE.query) for _ in range(2)]
    assert changed == (strategy not in ("prototype", "self-train"))
    assert np.array_equal(answers[0].masks, answers[1].masks)
    assert answers[0].masks.shape == CASE.truth.shape
    assert torch.equal(torch.get_rng_state(), drawn)
    if strategy == "prototype":
        assert adapted.record.steps == 0
    else:
        assert adapted.record.steps == 2 or adapted.record.stop
        assert 0 < adapted.record.trained < method.parameters()
        assert all(np.isfinite(adapted.record.losses))
    adapted.forget()
    assert state(method) == before


@pytest.mark.parametrize("name", NETWORKS)
def test_fine_tuning_lowers_the_loss_and_changes_the_answer(methods, name):
    method = methods(name)
    shots = CASE.support.shots
    method.adapt(CASE.support)
    before = method.loss(shots[0], shots).item(), method.probabilities(CASE.query)[0]
    adapted = wrap(method, AdaptOptions("finetune", steps=4, lr=1e-3, augment=False))
    adapted.adapt(CASE.support)
    after = method.loss(shots[0], shots).item(), method.probabilities(CASE.query)[0]
    adapted.forget()
    assert after[0] < 0.9 * before[0]
    assert float((after[1] - before[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_head_is_small_and_part_of_what_is_fine_tuned(methods, name):
    head, rest = (wrap(methods(name), AdaptOptions(strategy)).names for strategy in ("head", "finetune"))
    assert set(head) < set(rest)
    assert any(weight.startswith("controller.") for weight in head)
    assert not any(weight.startswith(("backbone.", "text_encoder.")) for weight in rest)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_pooled_without_the_sentence(methods, name):
    maps = methods(name).features(CASE.query.frames)
    assert (len(maps), maps.dim()) == (2, 4)
    assert not wrap(methods(name), AdaptOptions("prototype")).info.uses_text
