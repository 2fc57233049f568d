"""MAML, ANIL and Meta-SGD against the closed form of a scalar problem, on networks with ties, and with CMA."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewref.episodes.errors import InputError
from fewref.episodes.types import Clip, Expression, Query, Shot, SupportSet
from fewref.kernels.affinity import affinity
from fewref.kernels.deformable_attention import ms_deform_attn
from fewref.kernels.dispatch import differentiable_twice
from fewref.methods.adaptation import meta
from fewref.methods.adaptation.adapted import wrap
from fewref.methods.adaptation.options import META, AdaptOptions
from fewref.methods.adaptation.record import AdaptationError
from fewref.methods.adaptation.support import tasks
from fewref.methods.base import MethodInfo, Trainable
from fewref.methods.cma.adapter import CMA
from fewref.methods.shipped import CHECKPOINTS

# Not every test needs it: without it, the others and the error message are still tested.
needs_learn2learn = pytest.mark.skipif(not importlib.util.find_spec("learn2learn"), reason="make setup-meta adds it")

# Adaptation specification, section 6: w = 2, rate 0.1, support loss (w-0.5)^2/2, query loss (w-3)^2/2.
# steps: w, query loss, its derivative by w (second, first order) and by the rate (second, first order).
TABLE = {
    1: (1.85, 0.66125, (-1.035, -1.15), (1.725, 1.725)),
    2: (1.715, 0.825612, (-1.04085, -1.285), (3.4695, 3.66225)),
    3: (1.5935, 0.989121, (-1.025338, -1.4065), (5.126692, 5.717422)),
}


class Toy(Trainable):
    """A method without pixels, whose loss a test gives."""

    info = MethodInfo(name="toy", summary="")
    adapt_defaults: dict = {}

    def __init__(self, network: nn.Module, loss, roles: dict | None = None, **options: object) -> None:
        super().__init__(**options)
        self.network, self.roles, self._loss = network, roles or {}, loss

    def loss(self, target: object, memory: Sequence[object]) -> Tensor:
        return self._loss(self.network)

    def adapt(self, support: SupportSet) -> None: ...

    def predict(self, query: Query) -> None: ...

    def features(self, frames: np.ndarray) -> None: ...

    def probabilities(self, query: Query) -> None: ...


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))


def toy_task(step: int) -> tuple[None, list]:
    return None, []


def options(strategy: str, steps: int = 1, lr: float = 0.1, **more: object) -> AdaptOptions:
    return AdaptOptions(strategy=strategy, steps=steps, lr=lr, frozen=(), **more)


def scalar() -> Toy:
    return Toy(Scalar(), lambda network: 0.5 * (network.w - 0.5) ** 2, {"head": ("w",)})


@needs_learn2learn
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("strategy", META)
@pytest.mark.parametrize("steps", TABLE)
def test_the_scalar_problem(steps: int, strategy: str, first_order: bool) -> None:
    value, loss, by_weight, by_rate = TABLE[steps]
    method, losses = scalar(), []
    chosen = options(strategy, steps, first_order=first_order)
    rates = meta.fresh_rates(method, chosen, toy_task) if strategy == "meta-sgd" else None
    network = meta.meta_adapt(method, chosen, toy_task, rates, graph=True, losses=losses)
    query_loss = 0.5 * (network.w - 3) ** 2
    query_loss.backward()
    assert network.w.item() == pytest.approx(value, abs=1e-12)
    assert query_loss.item() == pytest.approx(loss, abs=1e-6)
    assert method.network.w.grad.item() == pytest.approx(by_weight[first_order], abs=1e-6)
    if rates:
        assert rates["w"].grad.item() == pytest.approx(by_rate[first_order], abs=1e-6)
    assert losses == pytest.approx([0.5 * (0.5 + 1.5 * 0.9**step - 0.5) ** 2 for step in range(steps)])
    assert method.network.w.item() == 2


@needs_learn2learn
@pytest.mark.parametrize("strategy", META)
def test_without_a_graph_the_result_stands_alone(strategy: str) -> None:
    method = scalar()
    rates = {"w": torch.tensor(0.1, dtype=torch.float64)}
    network = meta.meta_adapt(method, options(strategy, 2, first_order=False), toy_task, rates)
    assert isinstance(network.w, nn.Parameter)
    assert network.w.item() == pytest.approx(1.715)
    network.w.data.zero_()
    assert method.network.w.item() == 2
    assert method.network.w.grad is None


class Mixed(nn.Module):
    """What learn2learn alone stumbles over: a module with two names, a parameter of no use, a frozen one, a running
    statistic, and a module in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.idle = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.hidden = [self.first]
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.frozen(self.again(self.hidden[0](self.first(x)))))))


X = torch.linspace(-1, 1, 12).view(4, 3)


def mixed() -> Toy:
    method = Toy(Mixed().train(), lambda network: network(X).square().mean(), {"head": ("head.",)})
    method.network(X)  # moves the running statistics off their start
    return method


def state(network: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in network.state_dict().items()}


def steps_by_hand(network: Mixed, names: Sequence[str], steps: int, lr: float) -> dict[str, Tensor]:
    """Plain gradient steps in place, on a network that is put together anew."""
    own = Mixed()
    own.load_state_dict(network.state_dict())
    own.eval()
    for _ in range(steps):
        own.zero_grad()
        own(X).square().mean().backward()
        with torch.no_grad():
            for name, weight in own.named_parameters():
                if name in names and weight.grad is not None:
                    weight -= lr * weight.grad
    return own.state_dict()


@needs_learn2learn
@pytest.mark.parametrize("strategy", META)
@pytest.mark.parametrize("graph", [False, True])
def test_ties_buffers_and_idle_parameters(strategy: str, graph: bool) -> None:
    method = mixed()
    before, base = state(method.network), method.network
    modes = [module.training for module in base.modules()]
    chosen = options(strategy, 3, lr=0.2)
    rates = meta.fresh_rates(method, chosen, toy_task) if strategy == "meta-sgd" else None
    network = meta.meta_adapt(method, chosen, toy_task, rates, graph=graph)
    wanted = ("head.weight", "head.bias") if strategy == "anil" else ("first.weight", "first.bias", "head.weight")
    wanted = (*wanted, "head.bias")
    by_hand = steps_by_hand(base, wanted, 3, 0.2)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor.detach(), by_hand[name], rtol=0, atol=1e-6)
    assert network.first is network.again is network.hidden[0]
    assert network.norm.running_mean is not base.norm.running_mean
    network(X)  # in train mode, as the base is
    assert method.network is base
    assert state(base) == before
    assert [module.training for module in network.modules()] == modes == [module.training for module in base.modules()]
    assert all(weight.requires_grad != name.startswith("frozen") for name, weight in base.named_parameters())
    if strategy == "meta-sgd":
        assert sorted(rates) == ["first.bias", "first.weight", "head.bias", "head.weight"]
    if graph:
        network(X).sum().backward()
        assert base.first.weight.grad.abs().sum() > 0  # of the trunk under ANIL, too


@needs_learn2learn
def test_a_loss_that_is_no_number() -> None:
    method = scalar()
    method._loss = lambda network: torch.log(network.w - network.w - 1)
    base = method.network
    with pytest.raises(AdaptationError, match="step 1: the loss is nan; lower the learning rate of the inner steps"):
        meta.meta_adapt(method, options("maml"), toy_task)
    assert method.network is base


@needs_learn2learn
def test_rates_lie_beside_the_checkpoint(tmp_path: Path) -> None:
    method = scalar()
    method.weights = tmp_path / "weights.safetensors"
    with pytest.raises(
        InputError, match=r"weights\.rates\.safetensors: no such file; --adapt meta-sgd needs the rates"
    ):
        meta.check(method, options("meta-sgd"))
    meta.save_rates(method.weights, {"w": nn.Parameter(torch.tensor(0.25, dtype=torch.float64))})
    meta.check(method, options("meta-sgd"))
    # The rate of the options is for training alone.
    assert meta.meta_adapt(method, options("meta-sgd", lr=9.0), toy_task).w.item() == pytest.approx(2 - 0.25 * 1.5)
    for rates in ({"w": torch.ones(2)}, {"v": torch.tensor(0.1)}):
        with pytest.raises(InputError, match="learning rates of . do not fit the network of toy"):
            meta.meta_adapt(method, options("meta-sgd"), toy_task, rates)


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    for strategy in META:
        with pytest.raises(InputError, match=f"--adapt {strategy} needs learn2learn .*`make setup-meta`") as caught:
            meta.meta_adapt(scalar(), options(strategy), toy_task)
        assert "\n" not in str(caught.value)


QUIET = """
import random, warnings
import numpy
from fewref.methods.adaptation.meta import learn2learn
filters, python, theirs = list(warnings.filters), random.getstate(), numpy.random.get_state()[1].tolist()
assert learn2learn("test").__version__ == "0.2.0"
assert warnings.filters == filters and random.getstate() == python and numpy.random.get_state()[1].tolist() == theirs
"""


@needs_learn2learn
def test_its_import_is_silent_and_draws_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_operators_can_be_differentiated_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 5), (2, 3)]
    sizes = (1, 26, 2, 16), (1, 3, 2, 2, 2, 2), (1, 3, 2, 2, 2)  # wide heads, for which bags are chosen otherwise
    value, places, weights = (torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes)
    few = value[:, :, :, :3].contiguous()
    with differentiable_twice():
        inputs = [item.requires_grad_() for item in (few, places, weights)]
        assert torch.autograd.gradgradcheck(lambda v, p, w: ms_deform_attn(v, shapes, p, w), inputs)
        query, key, found = (torch.rand(1, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
        inputs = [item.requires_grad_() for item in (query, key, found)]
        assert torch.autograd.gradgradcheck(affinity, inputs)
    outside = ms_deform_attn(value, shapes, places, weights)
    with differentiable_twice():
        torch.testing.assert_close(ms_deform_attn(value, shapes, places, weights), outside)


def clip(name: str, frames: int = 2) -> Shot:
    """Noise with a brighter square, which is the object."""
    rng = np.random.default_rng(len(name))
    pixels = rng.integers(0, 128, (frames, 3, 64, 80)).astype(np.uint8)
    masks = np.zeros((frames, 64, 80), bool)
    masks[:, 16:44, 20:50] = True
    pixels[np.broadcast_to(masks[:, None], pixels.shape)] += 100
    expression = Expression("0", "the red dog on the left", ("1",), "dog")
    return Shot(Clip("data", name, tuple(str(frame) for frame in range(frames))), expression, pixels, masks)


@pytest.fixture(scope="module")
def cma() -> CMA:
    return CMA(weights="untrained")


@needs_learn2learn
@pytest.mark.parametrize("strategy", ["maml", "anil"])
def test_cma_learns_and_forgets(cma: CMA, strategy: str) -> None:
    shot = clip("support")
    chosen = AdaptOptions(strategy=strategy, steps=3, lr=1e-3, augment=False)
    before, base, losses = state(cma.network), cma.network, []
    network = meta.meta_adapt(cma, chosen, tasks([shot, shot], chosen, 0), losses=losses)
    assert losses[0] > losses[1] > losses[2]
    changed = {name.split(".")[0] for name, content in state(network).items() if content != before[name]}
    if strategy == "anil":
        assert changed == {"controller", "class_embed", "pixel_decoder"}
    else:
        assert {"transformer", "controller", "bbox_embed", "query_qkv"} <= changed
        assert not changed & {"backbone", "text_encoder"}
    assert cma.network is base
    adapted = wrap(cma, chosen)
    query = Query("q", shot.clip, shot.expression.text, clip("query").frames)
    answers = []
    for _ in range(2):
        adapted.adapt(SupportSet("dog", (shot,)))
        answers.append(adapted.predict(query))
        adapted.forget()
        assert cma.network is base
        assert state(base) == before
    assert np.array_equal(answers[0].masks, answers[1].masks)
    assert answers[0].confidence == answers[1].confidence


@needs_learn2learn
def test_second_order_through_cma_is_the_derivative() -> None:
    """Along the gradient itself, against a central difference of the whole of adapting and asking."""
    method = CMA(weights=CHECKPOINTS / "cma-builtin-1" / "weights.safetensors")
    support, query = clip("support"), clip("a query")
    chosen = AdaptOptions(strategy="anil", steps=1, lr=0.02, augment=False, first_order=False)
    task, weight = tasks([support], chosen, 0), method.network.controller.layers[-1].bias

    def outer(adapt: AdaptOptions) -> Tensor:
        with meta.in_place(method, meta.meta_adapt(method, adapt, task, graph=True)):
            return method.loss(query, [support])

    second = torch.autograd.grad(outer(chosen), weight)[0]
    first = torch.autograd.grad(outer(dataclasses.replace(chosen, first_order=True)), weight)[0]
    direction, losses = second / second.norm(), []
    for offset in (1e-3, -2e-3):
        with torch.no_grad():
            weight += offset * direction
        losses.append(outer(chosen).item())
    slope = (losses[0] - losses[1]) / 2e-3
    assert (second @ direction).item() == pytest.approx(slope, rel=0.05)
    assert (first @ direction).item() != pytest.approx(slope, rel=0.2)
