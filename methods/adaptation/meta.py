"""`maml`, `anil` and `meta-sgd`: plain gradient steps on a copy of the network, with the algorithms of learn2learn.

Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (ICML 2017); Raghu et al., "Rapid
Learning or Feature Reuse?" (ICLR 2020); Li et al., "Meta-SGD" (2017). Adaptation specification, 6.

The algorithms get a flat list of the parameters that adapt, and the copy gets their results: so tied parameters stay
tied under Meta-SGD, too, whatever a method keeps in plain attributes is copied, and no buffer is shared.
"""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from fewref.episodes.errors import InputError
from fewref.episodes.types import Shot
from fewref.kernels.dispatch import differentiable_twice
from fewref.methods.adaptation.finetune import trained_parameters
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.adaptation.record import AdaptationError
from fewref.methods.base import Trainable
from fewref.methods.weights import load_checkpoint, save_checkpoint

Task = Callable[[int], tuple[Shot, Sequence[Shot]]]


def meta_adapt(
    method: Trainable,
    options: AdaptOptions,
    task: Task,
    rates: Mapping[str, Tensor] | None = None,
    *,
    graph: bool = False,
    losses: list[float] | None = None,
) -> nn.Module:
    """The network after `options.steps` steps along the gradient of the method's loss; `method.network` stays as it is.

    task: from `support.tasks`. rates: for "meta-sgd", name of a parameter -> its learning rates in its own shape; those
    beside the method's checkpoint unless given. graph: for meta-training: the result depends on the parameters of
    `method.network` and on `rates`, through second derivatives as well unless `options.first_order`; otherwise it is a
    network of its own parameters, which shares those that do not adapt. losses: gets the loss before each step.
    Raises InputError without learn2learn and as `adapting`, AdaptationError for a loss that is not finite.
    """
    algorithms = learn2learn(f"--adapt {options.strategy}").algorithms
    base, inner = method.network, adapting(method, options, rates)
    parameters = nn.ParameterList(inner.values())
    first_order = options.first_order or not graph
    if options.strategy == "meta-sgd":
        own = nn.ParameterList(inner_rates(method, rates).values()).to(parameters[0].device)
        learner = algorithms.MetaSGD(parameters, lrs=own, first_order=first_order)
    else:
        unused = {"allow_unused": True, "allow_nograd": True}
        learner = algorithms.MAML(parameters, lr=options.lr, first_order=first_order, **unused)
    with torch.enable_grad():
        learner = learner.clone()
        now = list(learner.module.parameters())
        network = _copy(base, dict(zip(inner.values(), now, strict=True)))
        for step in range(options.steps):
            with in_place(method, network), nullcontext() if first_order else differentiable_twice():
                loss = method.loss(*task(step))
            value = loss.item()
            if losses is not None:
                losses.append(value)
            if not math.isfinite(value):
                raise AdaptationError(
                    f"step {step + 1}: the loss is {value}; lower the learning rate of the inner steps"
                )
            # Meta-SGD refuses a loss that leaves a parameter out; this way the parameter keeps its value.
            learner.adapt(loss + sum((0 * tensor).sum() for tensor in now))
            now = _replace(network, now, list(learner.module.parameters()))
    if not graph:
        _replace(network, now, [nn.Parameter(tensor.detach()) for tensor in now])
    for own, other in zip(network.modules(), base.modules(), strict=True):
        own.training = other.training
    return network


def check(method: Trainable, options: AdaptOptions) -> None:
    """Raises InputError where `meta_adapt` would: no learn2learn, no rates, nothing to train."""
    learn2learn(f"--adapt {options.strategy}")
    adapting(method, options)


def adapting(
    method: Trainable, options: AdaptOptions, rates: Mapping[str, Tensor] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that the inner steps change, by name: those that have rates, for "meta-sgd", or those of a role.

    Raises InputError where rates do not fit the network or are missing, and as `trained_parameters`.
    """
    if options.strategy != "meta-sgd":
        return trained_parameters(method, options)
    known = dict(method.network.named_parameters())
    rates = inner_rates(method, rates)
    for name, rate in rates.items():
        if name not in known or known[name].shape != rate.shape:
            raise InputError(f"learning rates of {name} do not fit the network of {method.info.name}; train them again")
    return {name: known[name] for name in rates}


def inner_rates(method: Trainable, rates: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The rates given, or those beside the method's checkpoint. Raises InputError where there are none."""
    if rates is not None:
        return dict(rates)
    path = rates_path(Path(method.weights))
    if not path.is_file():
        raise InputError(f"{path}: no such file; --adapt meta-sgd needs the rates that `train --meta meta-sgd` writes")
    return load_checkpoint(path)


def fresh_rates(method: Trainable, options: AdaptOptions, task: Task) -> dict[str, nn.Parameter]:
    """Rates of `options.lr`, to be learned, for the parameters that `finetune` trains and the first loss reaches."""
    chosen = trained_parameters(method, options)
    with torch.enable_grad(), in_place(method, _copy(method.network, {})):
        reached = torch.autograd.grad(method.loss(*task(0)), list(chosen.values()), allow_unused=True)
    named = zip(chosen.items(), reached, strict=True)
    return {name: nn.Parameter(torch.full_like(p, options.lr)) for (name, p), found in named if found is not None}


@contextmanager
def in_place(method: Trainable, network: nn.Module) -> Iterator[None]:
    """Lets a method work with another network."""
    base, method.network = method.network, network
    try:
        yield
    finally:
        method.network = base


def rates_path(weights: Path) -> Path:
    """Where the rates of a checkpoint lie: weights.safetensors -> weights.rates.safetensors."""
    return weights.with_suffix(".rates.safetensors")


def save_rates(weights: Path, rates: Mapping[str, Tensor]) -> None:
    """Write the rates of a checkpoint beside it, in full precision. Raises InputError as `save_checkpoint`."""
    save_checkpoint(rates_path(weights), rates, {"rates_of": weights.name}, torch.float32)


def learn2learn(option: str) -> ModuleType:
    """The library, imported without its warnings and prints. Raises InputError, naming what needs it, without it."""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            import learn2learn
    except ImportError as error:
        raise InputError(
            f"{option} needs learn2learn 0.2.0, which cannot be imported ({error}); install it with `make setup-meta`"
        ) from None
    return learn2learn


def _copy(network: nn.Module, tensors: Mapping[nn.Parameter, Tensor]) -> nn.Module:
    """A copy with buffers of its own, with these tensors in place of parameters, and sharing the other parameters.

    Its modes are those of fine-tuning: no dropout and no moving statistic, but all that only the training loss needs.
    """
    taken = {id(parameter): tensors.get(parameter, parameter) for parameter in network.parameters()}
    own = copy.deepcopy(network, taken).eval()
    own.training = True
    return own


def _replace(network: nn.Module, old: Sequence[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Put tensors in the places of others, under all of their names; returns the new ones."""
    successors = {id(before): after for before, after in zip(old, new, strict=True)}
    for module in network.modules():
        for name, tensor in module._parameters.items():
            module._parameters[name] = successors.get(id(tensor), tensor)
    return new
