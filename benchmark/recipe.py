"""How a network is trained: the options, the optimiser's groups and the learning rate of each step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewref.episodes.errors import InputError, near
from fewref.methods.layers.matcher import LossWeights

AFFINITY = ("support_qkv", "query_qkv", "conv_q")
LINEAR = ("reference_points", "sampling_offsets")
# Options that may change between a training and its continuation without changing any number.
FREE = ("log_every", "save_every", "workers", "cache_bytes", "half_weights", "checkpointing")
KINDS = {
    bool: "switch; give true or false",
    int: "whole number",
    float: "number",
    str: "word",
    tuple: "list",
    dict: "table",
}


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training; the defaults are the released recipe of CMA (specification of CMA, section 7).

    lr, lr_backbone, lr_text: learning rates (the last two apply to what of them is trainable).
    batch: episodes per step, over all processes. support_frames: of the support clip, 0 for a method that is trained
    without one. steps: length of the training; with 0 it lasts `epochs` of samples_per_class episodes for each class.
    schedule: "step" (times drop_factor at each of drop_epochs, or at drop_steps) or "cosine" (to zero); warmup: steps
    of linear increase before it. clip_norm: largest total norm of the gradients, 0 for none.
    loss_weights: terms (ce, bbox, giou, mask, dice) whose factor in the loss, not in the matching, is not that of
    `LossWeights`.
    clips: frames of a query clip, "window" (adjacent ones) or "scattered" (as ReferFormer draws them). augment:
    "paper", "tiny" or "none". own_support: share of episodes whose support is the query's own video and sentence, an
    easy start for a network that learns to look at the support. tracking: share of the steps whose batches
    have tracking images, for methods that track. size: (H, W) that every frame is brought to first, None for its own
    size.
    precision: "fp32", or "bf16" for the network under autocast, weights and optimiser still float32. checkpointing:
    keep less for the backward pass and compute it again: less memory, the same numbers, a second forward pass.
    faithful: "fixed", or "upstream" to train with upstream's faults: affinity projections in no optimiser group, boxes
    clamped along swapped axes, left and right swapped inside words, classes one after the other, supports that may not
    show the object.
    log_every, save_every: steps between writes of losses and of the checkpoint. workers: decoding threads.
    cache_bytes: memory for decoded frames. half_weights: write the final weights in half precision.
    """

    lr: float = 1e-4
    lr_backbone: float = 5e-5
    lr_text: float = 1e-5
    weight_decay: float = 5e-4
    batch: int = 1
    clip_frames: int = 5
    support_frames: int = 5
    steps: int = 0
    epochs: int = 24
    samples_per_class: int = 100
    schedule: str = "step"
    drop_epochs: tuple[int, ...] = (3, 5)
    drop_steps: tuple[int, ...] = ()
    drop_factor: float = 0.1
    warmup: int = 0
    clip_norm: float = 0.1
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    clips: str = "window"
    augment: str = "paper"
    own_support: float = 0.0
    tracking: float = 0.0
    size: tuple[int, int] | None = None
    precision: str = "fp32"
    checkpointing: bool = False
    faithful: str = "fixed"
    log_every: int = 20
    save_every: int = 500
    workers: int = 2
    cache_bytes: int = 2 << 30
    half_weights: bool = False

    def __post_init__(self) -> None:
        choices = {
            "schedule": ("step", "cosine"),
            "clips": ("window", "scattered"),
            "augment": ("paper", "tiny", "none"),
            "precision": ("fp32", "bf16"),
            "faithful": ("fixed", "upstream"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(
                    f"training option {name}: {getattr(self, name)!r} is unknown; {near(getattr(self, name), known)}"
                )
        if self.clips == "scattered" and self.clip_frames == 2:
            raise InputError("training option clips: a scattered clip has 1 frame or at least 3, not 2")
        terms = [term.name for term in dataclasses.fields(LossWeights)]
        for name in self.loss_weights:
            if name not in terms:
                raise InputError(f"training option loss_weights: {name!r} is unknown; {near(name, terms)}")
        least = dict.fromkeys(("batch", "clip_frames", "log_every", "save_every", "workers", "epochs"), 1)
        for name, smallest in {**least, "support_frames": 0}.items():
            if getattr(self, name) < smallest:
                raise InputError(
                    f"training option {name}: {getattr(self, name)} is too small; give at least {smallest}"
                )


def read_options(values: Mapping[str, object]) -> TrainOptions:
    """Options from the `train` part of a configuration; lists become tuples.

    Raises InputError for an unknown name and a value of another kind.
    """
    known = {name: type(default) for name, default in vars(TrainOptions()).items()}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"training option {name!r} is unknown; {near(name, known)}")
        kind = tuple if name == "size" else known[name]
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind and (name, value) != ("size", None):
            raise InputError(f"training option {name}: {value!r} is no {KINDS[kind]}")
        found[name] = value
    return TrainOptions(**found)


def group_of(name: str, faithful: str = "fixed") -> str:
    """Optimiser group of a trainable parameter: backbone, text, linear, affinity, main, or "" for none.

    The affinity projections are in no group with faithful="upstream": as released they are never trained
    (specification of CMA, section 9).
    """
    if name.startswith("backbone.0"):
        return "backbone"
    if name.startswith("text_encoder"):
        return "text"
    if any(part in name for part in LINEAR):
        return "linear"
    if name.startswith(AFFINITY):
        return "affinity" if faithful == "fixed" else ""
    return "main"


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], options: TrainOptions) -> list[dict]:
    """AdamW groups `{name, params, lr, base_lr}` of the parameters that have gradients enabled, none of them empty."""
    rates = {
        "main": options.lr,
        "backbone": options.lr_backbone,
        "text": options.lr_text,
        "linear": options.lr,
        "affinity": options.lr,
    }
    members: dict[str, list[nn.Parameter]] = {group: [] for group in rates}
    for name, parameter in named:
        if parameter.requires_grad and (group := group_of(name, options.faithful)):
            members[group].append(parameter)
    return [{"name": g, "params": p, "lr": rates[g], "base_lr": rates[g]} for g, p in members.items() if p]


def build_optimiser(network: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over the network's groups, in its fused form wherever PyTorch has that for the network's device."""
    common = {"lr": options.lr, "weight_decay": options.weight_decay}
    try:
        return torch.optim.AdamW(parameter_groups(network.named_parameters(), options), fused=True, **common)
    except RuntimeError:  # no fused form for this device or in this version
        return torch.optim.AdamW(parameter_groups(network.named_parameters(), options), **common)


def load_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take up a state dict, fused or not, and stay what `optimiser` is. Raises ValueError where it does not fit."""
    pairs = zip(state["param_groups"], optimiser.param_groups, strict=True)
    groups = [{**saved, "fused": own["fused"], "foreach": own["foreach"]} for saved, own in pairs]
    optimiser.load_state_dict({**state, "param_groups": groups})


def steps_per_epoch(options: TrainOptions, classes: int) -> int:
    return max(1, classes * options.samples_per_class // options.batch)


def total_steps(options: TrainOptions, classes: int) -> int:
    """Length of the whole training in steps."""
    return options.steps or options.epochs * steps_per_epoch(options, classes)


def rate(step: int, options: TrainOptions, classes: int) -> float:
    """Factor on every learning rate in step `step` (from 0)."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "cosine":
        length = max(1, total_steps(options, classes) - options.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - options.warmup) / length)))
    drops = options.drop_steps or [epoch * steps_per_epoch(options, classes) for epoch in options.drop_epochs]
    return options.drop_factor ** sum(step >= drop for drop in drops)


def strays(network: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Gradients of parameters that no group holds: they are never zeroed and take part in the clipping, as upstream."""
    held = {id(p) for group in optimiser.param_groups for p in group["params"]}
    named = network.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None and id(p) not in held}
