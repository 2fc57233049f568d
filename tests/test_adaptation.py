"""Strategies around a trainable method: what they change, that nothing stays changed, and how they fail."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math

import numpy as np
import pytest
import torch
from toy_trainable import Toy, blind, generators, query_of, state, support_of

from fewref.episodes.errors import InputError
from fewref.methods.adaptation.adapted import AdaptationError, Adapted, wrap
from fewref.methods.adaptation.finetune import roles_of, trained_parameters
from fewref.methods.adaptation.options import AdaptOptions, adapt_options
from fewref.methods.adaptation.restore import Keeper, own_generators
from fewref.methods.check import check_method
from fewref.methods.controls import Oracle

HAS_META = importlib.util.find_spec("learn2learn") is not None
CHANGING = ("finetune", "head", "self-train", *(("maml", "anil") if HAS_META else ()))
STRATEGIES = (*CHANGING, "prototype")


def options(strategy: str = "finetune", **changes) -> AdaptOptions:
    return AdaptOptions(strategy, **{"steps": 6, "lr": 0.01, **changes})


def weights(method) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in method.network.named_parameters()}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("support", [support_of(0), support_of(0, 1, 2)], ids=["1 shot", "3 shots"])
def test_the_state_after_an_episode_is_the_state_before(strategy, support):
    method = Toy()
    method.network.trunk.train()  # an odd mode comes back too
    method.network.controller.bias.grad = torch.ones(1)
    before, drawn = state(method), generators()
    adapted = wrap(method, options(strategy))
    adapted.adapt(support)
    answers = [adapted.predict(query_of(number)) for number in (5, 6, 5)]
    assert np.array_equal(answers[0].masks, answers[2].masks)
    adapted.forget()
    assert state(method) == before
    assert generators() == drawn


@pytest.mark.parametrize("strategy", CHANGING)
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_the_state_comes_back_after_an_exception(strategy, error):
    method = Toy()
    before, drawn = state(method), generators()
    adapted = wrap(method, options(strategy))
    method.fails = {4: error}

    def episode():
        adapted.adapt(support_of(0))
        return adapted.predict(query_of(5))

    with pytest.raises(type(error)):
        episode()
    assert state(method) == before
    assert generators() == drawn
    method.fails = {}
    got = episode()
    fresh = wrap(Toy(), options(strategy))
    fresh.adapt(support_of(0))
    assert np.array_equal(got.masks, fresh.predict(query_of(5)).masks)


def test_a_failing_prediction_does_not_keep_the_weights():
    method = Toy()
    before = state(method)
    adapted = wrap(method, options())
    adapted.adapt(support_of(0))
    with pytest.raises(AttributeError):
        adapted.predict(None)
    assert state(method) != before
    adapted.forget()
    assert state(method) == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_of_episodes_does_not_matter(strategy):
    def answers(order):
        adapted, found = wrap(Toy(), options(strategy)), {}
        for number in order:
            adapted.adapt(support_of(number, number + 10))
            for query in (number, number + 1)[:: 1 if order[0] == 0 else -1]:
                prediction = adapted.predict(query_of(20 + query))
                found[number, query] = prediction.masks.tobytes(), prediction.confidence, adapted.record.losses
            adapted.forget()
        return found

    torch.manual_seed(1)
    first = answers([0, 1, 2])
    torch.manual_seed(2)
    assert answers([2, 0, 1]) == first
    assert len({masks for masks, _, _ in first.values()}) > 1


@pytest.mark.parametrize(
    ("strategy", "frozen", "expected"),
    [
        ("finetune", ("backbone", "text"), {"trunk.0", "controller", "unused"}),
        ("finetune", ("text", "head"), {"backbone.0", "trunk.0", "unused"}),
        ("head", ("backbone", "text"), {"controller"}),
    ],
)
def test_only_the_chosen_roles_change(strategy, frozen, expected):
    method = Toy()
    before = weights(method)
    adapted = wrap(method, options(strategy, frozen=frozen, weight_decay=0.5))
    assert {name.rsplit(".", 1)[0] for name in adapted.names} == expected
    adapted.adapt(support_of(0))
    changed = {name for name, weight in weights(method).items() if not torch.equal(weight, before[name])}
    reached = {name for name in adapted.names if not name.startswith("unused")}
    assert changed == reached  # weights without a gradient do not even decay
    assert adapted.record.steps == len(adapted.record.losses) == 6
    assert adapted.record.trained == sum(before[name].numel() for name in reached)
    assert adapted.record.seconds > 0


def test_the_steps_are_those_of_adamw():
    method, settings = Toy(), options(augment=False, clip_norm=0.05, weight_decay=0.1)
    other, shots = copy.deepcopy(method), support_of(0, 1).shots
    other.network.requires_grad_(False)
    chosen = [other.network.trunk[0].weight, other.network.trunk[0].bias, *other.network.controller.parameters()]
    optimiser = torch.optim.AdamW([weight.requires_grad_(True) for weight in chosen], lr=0.01, weight_decay=0.1)
    key = '[0,"finetune",[["check","dog-0-0","00000","00001","00002","00003","the dog that moves to the right"],'
    key += '["check","dog-1-0","00000","00001","00002","00003","the dog that moves to the right"]]]'
    with own_generators(key, "cpu"):
        for step in range(6):
            optimiser.zero_grad()
            other.loss(shots[step % 2], [shots[1 - step % 2]]).backward()
            torch.nn.utils.clip_grad_norm_(chosen, 0.05)
            optimiser.step()
    adapted = wrap(method, settings)
    adapted.adapt(support_of(0, 1))
    for name, weight in weights(other).items():
        assert torch.equal(weight, weights(method)[name]), name


def test_the_support_is_encoded_with_the_adapted_weights():
    method = Toy()
    adapted = wrap(method, options(frozen=("text",), lr=0.1))
    adapted.adapt(support_of(0))
    with torch.inference_mode():
        assert torch.equal(method.prior, method.encode(support_of(0).shots))
    adapted.forget()
    assert method.prior is None


def test_modes_and_flags_while_adapting():
    class Watching(Toy):
        def loss(self, target, memory):
            seen.append([module.training for module in self.network.modules()])
            flags.append({name for name, weight in self.network.named_parameters() if weight.requires_grad})
            return super().loss(target, memory)

    seen, flags = [], []
    adapted = wrap(Watching(), options("head"))
    adapted.adapt(support_of(0))
    assert all(modes[0] and not any(modes[1:]) for modes in seen)
    assert all(names == {"controller.weight", "controller.bias"} for names in flags)
    assert not adapted.method.network.training


def test_a_loss_that_is_not_finite_names_its_step():
    class Diverging(Toy):
        def loss(self, target, memory):
            return super().loss(target, memory) * (math.nan if self.calls == 3 else 1)

    method = Diverging()
    before = state(method)
    with pytest.raises(AdaptationError, match=r"step 3: the loss is nan; lower the learning rate"):
        wrap(method, options()).adapt(support_of(0))
    assert state(method) == before


def test_a_gradient_that_is_not_finite_names_its_step():
    class Steep(Toy):
        def loss(self, target, memory):
            loss = super().loss(target, memory)
            return loss + (0 * self.network.controller.bias.sum()).abs().sqrt() * 0

    with pytest.raises(AdaptationError, match="step 1: the gradient is not finite"):
        wrap(Steep(), options()).adapt(support_of(0))


def test_a_loss_apart_from_the_weights():
    class Apart(Toy):
        def loss(self, target, memory):
            return super().loss(target, memory).detach()

    with pytest.raises(AdaptationError, match="step 1: the loss depends on none of"):
        wrap(Apart(), options()).adapt(support_of(0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_support_that_never_shows_its_object(strategy):
    method = Toy()
    before = state(method)
    with pytest.raises(AdaptationError, match="never shows its object"):
        wrap(method, options(strategy)).adapt(blind(support_of(0, 1)))
    assert state(method) == before


def test_what_cannot_be_wrapped():
    with pytest.raises(InputError, match="--adapt finetune: method oracle has no training loss; use --adapt none"):
        wrap(Oracle(), options())
    with pytest.raises(InputError, match="option frozen: method toy keeps its text frozen; name text in it"):
        wrap(Toy(), options(frozen=("backbone",)))
    with pytest.raises(InputError, match="--adapt finetune: method toy has no weights of no role to train"):
        wrap(Toy(), options(frozen=("backbone", "text", "trunk", "head")))
    method = Toy()
    assert wrap(method, options("none")) is method
    method.roles = {}
    with pytest.raises(InputError, match="--adapt head: method toy has no weights of head to train"):
        wrap(method, options("head"))


def test_what_a_wrapped_method_says_of_itself():
    adapted = wrap(Toy(seed=3, window=5), options("self-train"))
    assert (adapted.strategy, adapted.transductive, adapted.seed, adapted.window) == ("self-train", True, 3, 5)
    adapted.window = 2
    assert adapted.method.window == 2
    assert not wrap(Toy(), options()).transductive
    assert not wrap(Toy(), options("prototype")).info.uses_text


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_contract_of_methods_holds(strategy):
    class Wrapped(Adapted):
        info = Toy.info

        def __init__(self, **chosen):
            super().__init__(Toy(**chosen), options(strategy, steps=3))

    failed = {check.name: check.detail for check in check_method(Wrapped) if not check.passed}
    assert list(failed) == ["empty support masks and no sentence"]
    assert "AdaptationError" in failed["empty support masks and no sentence"]


def test_the_role_of_a_tied_weight_may_come_from_any_name():
    found = roles_of(Toy().network, {"head": ("again.",)})
    assert {name for name, _, role in found if role == "head"} == {"trunk.0.weight", "trunk.0.bias"}
    assert len(found) == len(list(Toy().network.parameters()))


def test_batch_norms_are_never_trained():
    names = trained_parameters(Toy(), options(frozen=("text",)))
    assert "backbone.0.weight" in names
    assert not any(name.startswith(("backbone.1.", "trunk.1.")) for name in names)


def test_a_keeper_brings_back_replaced_and_overwritten_tensors():
    method = Toy()
    before, network = state(method), method.network

    def spoil():
        with Keeper(network):
            network.train()
            network(support_of(0).shots[0].frames, "a", torch.zeros(8, 1, 1)).sum().backward()
            network.backbone[1].running_mean = torch.ones(8)
            network.controller.weight = torch.nn.Parameter(torch.zeros(1, 8, 1, 1))
            network.unused.weight.data.fill_(math.nan)
            network.requires_grad_(False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        spoil()
    assert state(method) == before


def test_own_generators_follow_the_key_alone():
    def draw(key):
        with own_generators(key, "cpu"):
            return torch.rand(2).tolist(), np.random.rand(2).tolist()

    torch.manual_seed(1)
    before = generators()
    first = draw("a")
    assert generators() == before
    torch.rand(1)
    assert draw("a") == first
    assert draw("b") != first


def test_options_may_come_from_a_configuration():
    chosen = adapt_options("head", {"steps": 3, "frozen": ["text"]}, {"lr": 1})
    assert dataclasses.asdict(chosen) | {"steps": 3, "frozen": ("text",), "lr": 1.0} == dataclasses.asdict(chosen)
