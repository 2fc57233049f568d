"""The adaptation strategies by name, and what can be set of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewref.episodes.errors import InputError, near

META = ("maml", "anil", "meta-sgd")
STRATEGIES = ("none", "finetune", "head", "prototype", *META, "self-train")
TRANSDUCTIVE = ("self-train",)  # these see the query's frames (never its masks) while they adapt
ROLES = ("backbone", "text", "trunk", "head")


@dataclass(frozen=True)
class AdaptOptions:
    """One strategy with its settings (adaptation specification, 3 to 8).

    steps, lr, weight_decay, clip_norm: of AdamW (`finetune`, `head`, `self-train`) or of the plain inner steps (the
    meta-learned ones, which use steps and lr alone). frozen: roles whose parameters stay as they are. augment: draw an
    augmentation of the support in each step. first_order: leave out the second derivatives in meta-training.
    temperature: factor of the cosine in `prototype`. rounds, confident: of `self-train`, the number of labellings and
    the share of frames that each keeps.
    """

    strategy: str = "none"
    steps: int = 20
    lr: float = 1e-5
    weight_decay: float = 5e-4
    clip_norm: float = 0.1
    frozen: tuple[str, ...] = ("backbone", "text")
    augment: bool = True
    first_order: bool = True
    temperature: float = 20.0
    rounds: int = 2
    confident: float = 0.5

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InputError(f"--adapt {self.strategy!r} is unknown: {near(self.strategy, STRATEGIES)}")
        for role in self.frozen:
            if role not in ROLES:
                raise InputError(f"adaptation option frozen: role {role!r} is unknown: {near(role, ROLES)}")
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"adaptation option {name}: {getattr(self, name)} is too small; give at least 1")
        if not 0 < self.confident <= 1:
            raise InputError(f"adaptation option confident: {self.confident} is no share; give one in (0,1]")


def adapt_options(strategy: str, defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> AdaptOptions:
    """Options of a strategy: the dataclass's, then a configuration's `defaults`, then `changes` of the user.

    Raises InputError, with near names, for an unknown strategy, an unknown option and a value of another kind.
    """
    known = {field.name: field for field in dataclasses.fields(AdaptOptions) if field.name != "strategy"}
    values: dict[str, Any] = {"strategy": strategy}
    for name, value in {**defaults, **changes}.items():
        if name not in known:
            raise InputError(f"adaptation option {name!r} is unknown: {near(name, known)}")
        kind = type(known[name].default)
        value = tuple(value) if kind is tuple and isinstance(value, list) else value
        value = float(value) if kind is float and isinstance(value, int) else value
        if type(value) is not kind:
            raise InputError(f"adaptation option {name}: {value!r} is no {kind.__name__}")
        values[name] = value
    return AdaptOptions(**values)
