"""CMA behind adapt and predict: the contract, one encoding per episode, windows, configurations, shipped weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fewref.episodes.errors import InputError
from fewref.episodes.synthetic import CATEGORIES
from fewref.episodes.synthetic_scene import COLOURS
from fewref.episodes.synthetic_text import NUMBERS, RELATIONS, WORDS
from fewref.episodes.types import SupportSet
from fewref.methods.check import check_method, make_case
from fewref.methods.cma.adapter import CMA, CMABase, CMASelf
from fewref.methods.cma.inference import masks_at
from fewref.methods.network_config import CONFIGS, build_tokenizer, read_config
from fewref.methods.shipped import find_weights, shipped_names
from fewref.methods.weights import load_checkpoint

VARIANTS = (CMA, CMASelf, CMABase)


@pytest.mark.parametrize("cls", VARIANTS)
def test_keeps_the_contract(cls):
    checks = check_method(cls, weights="untrained")
    assert [item for item in checks if not item.passed] == []


def test_needs_weights():
    with pytest.raises(InputError, match="method cma needs a checkpoint; give --weights FILE or untrained"):
        CMA()


@pytest.mark.parametrize("cls", VARIANTS)
def test_the_support_is_encoded_once_per_episode(cls, monkeypatch):
    method, case = cls(weights="untrained", window=2), make_case(0, "dog", (48, 64), frames=5)
    net, calls = method.network, []
    for name in ("encode_support", "prepare_support"):
        real = getattr(net, name)
        monkeypatch.setattr(net, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    method.adapt(case.support)
    for _ in range(2):  # three windows each
        method.predict(case.query)
    assert calls == ["encode_support", "prepare_support"]


def test_windows_are_answered_on_their_own():
    """With windows of two frames a clip of four equals its two halves."""
    method, case = CMA(weights="untrained", window=2), make_case(0, "dog", (48, 64))
    method.adapt(case.support)
    whole = method.predict(case.query).masks
    halves = [method.predict(replace(case.query, frames=case.query.frames[i : i + 2])).masks for i in (0, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_pairing_variants_never_see_more_frames_than_the_support():
    case = make_case(0, "dog", (48, 64), frames=3)
    method = CMASelf(weights="untrained", window=10)
    method.adapt(case.support)
    assert method._chunk() == 3
    with_short = SupportSet("dog", (*case.support.shots, make_case(1, "dog", (48, 64), frames=2).support.shots[0]))
    method.adapt(with_short)
    assert method._chunk() == 2


def test_several_shots_and_their_order():
    """Attention over the pixels of all shots does not depend on which comes first, and a second one has an effect."""
    case, other = make_case(0, "dog", (48, 64)), make_case(1, "dog", (48, 64))
    method, confidences = CMA(weights="untrained"), []
    first, second = case.support.shots[0], other.support.shots[0]
    for shots in ((first,), (first, second), (second, first)):
        method.adapt(SupportSet("dog", shots))
        confidences.append(method.predict(case.query).confidence)
    assert confidences[1] == pytest.approx(confidences[2], abs=1e-6)
    assert confidences[0] != pytest.approx(confidences[1], abs=1e-6)


def test_half_precision_is_close():
    case, answers = make_case(0, "dog", (48, 64)), []
    for precision in ("fp32", "bf16"):
        method = CMA(weights="untrained", precision=precision)
        method.adapt(case.support)
        answers.append(method.predict(case.query))
    assert answers[0].confidence == pytest.approx(answers[1].confidence, abs=0.02)


def test_masks_are_those_of_the_probabilities():
    prob = torch.zeros(1, 4, 4)
    prob[0, :2] = 1
    np.testing.assert_array_equal(masks_at(prob, (4, 4)).numpy(), prob.numpy() >= 0.5)


def test_configurations(tmp_path):
    values = json.loads((CONFIGS / "cma_tiny.json").read_text())
    with pytest.raises(InputError, match="--config 'tini' is unknown: did you mean 'tiny'"):
        read_config("cma", "tini")
    (tmp_path / "more.json").write_text(json.dumps(values | {"extra": 1}))
    with pytest.raises(InputError, match="more.json: a configuration of cma has exactly the fields"):
        read_config("cma", str(tmp_path / "more.json"))
    (tmp_path / "odd.json").write_text(json.dumps(values | {"network": {"hiden": 64}}))
    with pytest.raises(InputError, match="odd.json: is not for this network.*hiden"):
        CMA.build(read_config("cma", str(tmp_path / "odd.json")))
    (tmp_path / "lost.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="tiny_tokenizer.json: no tokenizer there"):
        build_tokenizer(read_config("cma", str(tmp_path / "lost.json")))


def test_the_paper_configuration_has_the_parameters_of_upstream():
    with torch.device("meta"):
        network = CMA.build(read_config("cma", "paper"))
    assert sum(parameter.numel() for parameter in network.parameters()) == 178_393_809


def test_the_tiny_vocabulary_has_attributes_but_no_category():
    """The sentence says which object of the category is meant; what the category looks like, only the support shows."""
    phrases = [*COLOURS, *RELATIONS, *(word for options in WORDS.values() for word in options)]
    phrases += [number for options in NUMBERS.values() for number in options]
    tokenizer = build_tokenizer(read_config("cma", "tiny"))
    unknown = 3
    for phrase in phrases:
        assert unknown not in tokenizer([phrase])[0], phrase
    for names in CATEGORIES.values():
        for name in names:
            assert set(tokenizer([name.replace("_", " ")])[0][0, 1:-1].tolist()) == {unknown}, name


def test_a_training_starts_from_the_shipped_weights():
    start = Path(find_weights("cma", "cma-builtin-pretrain-none", "tiny", "builtin", "1"))
    parts = CMA.training("tiny", start)
    state, own = load_checkpoint(start), parts.network.state_dict()
    torch.testing.assert_close(own["input_proj.0.0.weight"], state["input_proj.0.0.weight"].float())
    assert parts.options["steps"] < CMA.training("tiny").options["steps"]


def test_names_of_weights():
    assert "cma-builtin-1" in shipped_names()
    with pytest.raises(InputError, match="did you mean 'cma-builtin-1'"):
        find_weights("cma", "cma-builtim-1", "tiny", "builtin", "1")
    with pytest.raises(InputError, match="no checkpoint of cma is shipped for mini-davis, group all, config tiny"):
        find_weights("cma", None, "tiny", "mini-davis", "all")
