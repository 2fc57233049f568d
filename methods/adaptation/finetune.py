"""`finetune` and `head`: AdamW steps on the method's own loss over the support (adaptation specification, 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fewref.episodes.errors import InputError
from fewref.episodes.types import Shot
from fewref.methods.adaptation.options import ROLES, AdaptOptions
from fewref.methods.adaptation.record import AdaptationError, AdaptationRecord
from fewref.methods.base import Trainable

HEAD_ONLY = ("head", "anil")


def finetune(
    method: Trainable, options: AdaptOptions, task: Callable[[int], tuple[Shot, Sequence[Shot]]]
) -> AdaptationRecord:
    """Take `options.steps` steps in place; weights, modes and flags stay changed. task: from `support.tasks`.

    Raises AdaptationError for a loss or gradient that is not finite, naming the step.
    """
    parameters = trained_parameters(method, options)
    open_for_training(method.network, parameters)
    descent = Descent(parameters, options)
    with torch.enable_grad():
        for step in range(options.steps):
            descent.step(method.loss(*task(step)))
    return descent.record()


def trained_parameters(method: Trainable, options: AdaptOptions) -> dict[str, nn.Parameter]:
    """The weights that a strategy changes, by name: only the role "head" for `head` and `anil`, all roles that are not
    frozen otherwise; never those of batch norms, nor what the network itself keeps frozen.

    Raises InputError where nothing is left, and for a role to train that the network keeps frozen.
    """
    roles = [role for role in ROLES if role not in options.frozen]
    roles = ["head"] if options.strategy in HEAD_ONLY else roles
    found = roles_of(method.network, method.roles)
    for role in roles:
        members = [weight for _, weight, own in found if own == role]
        if members and not any(weight.requires_grad for weight in members):
            raise InputError(
                f"adaptation option frozen: method {method.info.name} keeps its {role} frozen; name {role} in it"
            )
    norms = {id(weight) for norm in _batch_norms(method.network) for weight in norm.parameters()}
    chosen = {
        name: weight
        for name, weight, role in found
        if role in roles and weight.requires_grad and id(weight) not in norms
    }
    if not chosen:
        raise InputError(
            f"--adapt {options.strategy}: method {method.info.name} has no weights of {' or '.join(roles) or 'no role'}"
            " to train; freeze fewer roles (adaptation option frozen)"
        )
    return chosen


def roles_of(network: nn.Module, roles: Mapping[str, Sequence[str]]) -> list[tuple[str, nn.Parameter, str]]:
    """(name, parameter, role) of every parameter, tied ones once; a role's prefix may be of any of a parameter's
    names, and the first role in the order of `roles` that fits is taken, else "trunk"."""
    names: dict[int, list[str]] = {}
    for name, weight in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)

    def role(known: Sequence[str]) -> str:
        fits = (own for own, prefixes in roles.items() if any(name.startswith(tuple(prefixes)) for name in known))
        return next(fits, "trunk")

    return [(name, weight, role(names[id(weight)])) for name, weight in network.named_parameters()]


def open_for_training(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let gradients reach these parameters alone.

    Every sub-module is in eval mode, so that no dropout draws and no statistic moves; the network itself is in train
    mode, so that it calculates what only its training loss needs.
    """
    network.requires_grad_(False)
    for weight in parameters.values():
        weight.requires_grad_(True)
    network.eval()
    network.training = True


class Descent:
    """AdamW with clipped gradients over some parameters; keeps the losses and which parameters it reached."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], options: AdaptOptions) -> None:
        self.parameters, self.clip_norm = parameters, options.clip_norm
        self.optimiser = torch.optim.AdamW(parameters.values(), lr=options.lr, weight_decay=options.weight_decay)
        self.losses: list[float] = []
        self.reached: set[str] = set()

    def step(self, loss: Tensor) -> None:
        """One step along the gradient of a loss (). Raises AdaptationError where it is not finite."""
        self.losses.append(float(loss.detach()))
        number = f"step {len(self.losses)}"
        if not loss.isfinite():
            raise AdaptationError(f"{number}: the loss is {self.losses[-1]}; lower the learning rate (lr)")
        if not loss.requires_grad:
            raise AdaptationError(f"{number}: the loss depends on none of the {len(self.parameters)} trained weights")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm)
        if not norm.isfinite():
            raise AdaptationError(f"{number}: the gradient is not finite; lower the learning rate (lr)")
        self.optimiser.step()
        self.reached |= {name for name, weight in self.parameters.items() if weight.grad is not None}

    def record(self, stop: str = "") -> AdaptationRecord:
        """What was done so far."""
        trained = sum(weight.numel() for name, weight in self.parameters.items() if name in self.reached)
        return AdaptationRecord(steps=len(self.losses), trained=trained, losses=tuple(self.losses), stop=stop)


def _batch_norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
