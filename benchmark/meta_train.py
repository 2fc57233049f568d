"""`train --meta`: learn weights that a few gradient steps on a support set make good at its queries.

MAML, ANIL and Meta-SGD (adaptation specification, 6): the inner steps lower the method's loss on the support clip of a
base category, the outer one that of the query clip under the adapted weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewref.benchmark.inputs import choose_device, open_dataset
from fewref.benchmark.recipe import TrainOptions, read_options, total_steps
from fewref.benchmark.train import LossLog, Training, episode_source
from fewref.benchmark.train_data import EpisodeSource
from fewref.benchmark.training_record import base_videos, option_words, start_name, write_record
from fewref.episodes.errors import InputError, near
from fewref.episodes.transforms import ClipSample
from fewref.episodes.types import Clip, Expression, Shot
from fewref.methods.adaptation.finetune import trained_parameters
from fewref.methods.adaptation.meta import fresh_rates, in_place, learn2learn, meta_adapt, save_rates
from fewref.methods.adaptation.options import META, AdaptOptions, adapt_options
from fewref.methods.adaptation.record import AdaptationError
from fewref.methods.adaptation.support import tasks
from fewref.methods.base import UNTRAINED, Trainable
from fewref.methods.registry import load_method

LEAST_FRAMES = 2  # of a clip, so that a support can be split into what is learned and what is looked at
TRIES = 50
START_SHARE = 0.1  # of the recipe's learning rates, from a trained checkpoint: the full ones undo what it learned
RATE_SHARE = 0.01  # step of Meta-SGD's rates, as a share of what they start from


def meta_train(
    *,
    method: str,
    dataset: str,
    data_root: Path | None,
    group: str,
    config: str,
    out: Path,
    meta: str,
    inner_steps: int | None = None,
    inner_lr: float | None = None,
    first_order: bool = True,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    init: Path | None = None,
    resume: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Meta-train a method on the base categories of one group; returns the path of the weights.

    meta: "maml", "anil" or "meta-sgd". inner_steps, inner_lr: those of the configuration for that strategy unless
    given. first_order: leave out second derivatives. steps: length of the training, which the schedule of the learning
    rate follows; that of the configuration unless given. changes: as of `train_group`.
    Writes below `out` what `train` writes, training.json, and for "meta-sgd" weights.rates.safetensors.
    Raises InputError for bad options and data, a method without a training loss, and where learn2learn is missing.
    """
    if meta not in META:
        raise InputError(f"--meta {meta!r} is unknown: {near(meta, META)}")
    if inner_lr is not None and not 0 < inner_lr < math.inf:
        raise InputError(f"--inner-lr {inner_lr}: give a positive number, such as 0.001")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--meta {meta} trains in one process; leave torchrun away")
    learn2learn(f"--meta {meta}")
    cls, device, out = load_method(method), choose_device(device), Path(out)
    torch.manual_seed(seed)
    parts = cls.training(config, init)
    if not issubclass(cls, Trainable):
        raise InputError(f"--meta {meta}: method {method} has no loss of a support set; choose another method")
    changes = changes or {}
    options = read_options({**parts.options, **changes, **({"steps": steps} if steps else {})})
    if options.checkpointing:  # the adapted weights are gone by the time that `backward` would compute with them again
        raise InputError(f"--meta {meta}: cannot be trained with checkpointing; leave --option checkpointing away")
    learner = cls(weights=UNTRAINED, config=config, device=device, precision=options.precision, seed=seed)
    learner.network = parts.network.to(device).train()
    inner = {"steps": inner_steps, "lr": inner_lr, "first_order": first_order}
    given = {name: value for name, value in inner.items() if value is not None}
    adapt = replace(adapt_options(meta, learner.adapt_defaults.get(meta, {}), given), augment=False)
    options = meta_options(options, adapt.steps, START_SHARE if init else 1.0)
    trained_parameters(learner, adapt)  # says at once what cannot be adapted
    index = open_dataset(dataset, data_root)
    group, pools = base_videos(index, group)
    source = episode_source(index, pools, options, seed)
    run = MetaTraining.of(learner, adapt, source, seed, out)
    done = run.restore() if resume else 0
    last = total_steps(options, len(source.videos))
    log = LossLog(out / "losses.csv", done)
    episodes = ((step, draw(source, step)) for step in range(done, last))
    done = run.loop(episodes, lambda step, clips: run.outer_step(step, clips, log), log, done, last)
    words = f"fewref train --method {method} --dataset {dataset} --group {group} --config {config} --seed {seed}"
    words += f" --meta {meta} --inner-steps {adapt.steps} --inner-lr {adapt.lr:g}"
    words += "" if first_order else " --second-order"
    words += (f" --steps {steps}" if steps else "") + (f" --init {start_name(init)}" if init else "")
    words = " ".join([words, *option_words(changes)])
    described = {"meta": meta, "inner_steps": adapt.steps, "inner_lr": adapt.lr, "first_order": adapt.first_order}
    entries = {"command": words, "method": method, "config": config, "group": group}
    run.write_weights(done, parts.tied, {**entries, **{name: str(value) for name, value in described.items()}})
    if run.rates:
        save_rates(run.weights, run.rates)
    write_record(out, command=words, seed=seed, options=asdict(options), index=index, pools=pools, adaptation=described)
    return run.weights


def meta_options(options: TrainOptions, inner_steps: int, share: float = 1.0) -> TrainOptions:
    """A recipe for meta-training: clips of two frames at least, a warm-up that is a tenth of it at most, last.pt
    written after as many gradients as otherwise, and a share of the learning rates."""
    frames = max(LEAST_FRAMES, options.clip_frames)
    return replace(
        options,
        clip_frames=frames,
        support_frames=max(LEAST_FRAMES, options.support_frames or frames),
        warmup=min(options.warmup, options.steps // 10) if options.steps else options.warmup,
        save_every=max(1, options.save_every // (inner_steps + 1)),
        lr=share * options.lr,
        lr_backbone=share * options.lr_backbone,
        lr_text=share * options.lr_text,
    )


def draw(source: EpisodeSource, step: int) -> list[tuple[Shot, Shot]]:
    """Query and support clip of every item of a step, with pixels, augmented; the support shows its object.

    Raises InputError where the augmentation leaves no clip with its object.
    """
    batch, found = source.options.batch, []
    for item in range(batch):
        for extra in range(TRIES):
            query, support = source.episode(step, item + extra * batch)[:2]
            if support.masks.any():
                found.append((as_shot(query), as_shot(support)))
                break
        else:
            raise InputError(f"{source.cache.index.root}: no support clip shows its object; check the masks")
    return found


def as_shot(sample: ClipSample) -> Shot:
    """A training clip as methods take it; its frames are called by their numbers."""
    clip = Clip("", "", tuple(str(number) for number in range(len(sample.frames))))
    frames = np.ascontiguousarray(sample.frames.transpose(0, 3, 1, 2))
    return Shot(clip, Expression("", sample.text, (), ""), frames, np.ascontiguousarray(sample.masks))


@dataclass(kw_only=True)
class MetaTraining(Training):
    """A training whose step is the outer one. rates: of Meta-SGD, learned with the weights."""

    method: Trainable
    adapt: AdaptOptions
    rates: dict[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def of(cls, method: Trainable, adapt: AdaptOptions, source: EpisodeSource, seed: int, out: Path) -> MetaTraining:
        """A training before its first step; with "meta-sgd", rates for the parameters that a first episode reaches."""
        rates = {}
        if adapt.strategy == "meta-sgd":
            _, support = draw(source, 0)[0]
            rates = fresh_rates(method, adapt, tasks([support], adapt, seed, memory=method.info.uses_support))
        return cls(
            network=method.network,
            options=source.options,
            seed=seed,
            out=out,
            classes=list(source.videos),
            device=torch.device(method.device),
            method=method,
            adapt=adapt,
            rates=rates,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates:
            lr, rates = self.adapt.lr * RATE_SHARE, list(self.rates.values())
            self.optimiser.add_param_group(
                {"name": "rates", "params": rates, "lr": lr, "base_lr": lr, "weight_decay": 0.0}
            )

    def outer_step(self, step: int, episodes: Sequence[tuple[Shot, Shot]], log: LossLog) -> None:
        """One update of the weights, and of the rates, from (query, support) pairs.

        Raises InputError for an inner loss that is not finite.
        """
        lr = self.begin(step)
        losses = []
        for query, support in episodes:
            try:
                total, inner = self.episode(query, support)
            except AdaptationError as error:
                raise InputError(f"{self.out}: --meta {self.adapt.strategy}, step {step + 1}: inner {error}") from None
            (total / len(episodes)).backward()
            losses.append(torch.stack([total.detach().cpu(), torch.tensor(inner[0]), torch.tensor(inner[-1])]))
        self.update()
        total, first, final = torch.stack(losses).mean(0)
        log.add(step + 1, lr, {"total": total, "loss_support_first": first, "loss_support_last": final})

    def episode(self, query: Shot, support: Shot) -> tuple[Tensor, list[float]]:
        """The loss () on the query of the network adapted to the support, and the losses of the inner steps."""
        inner: list[float] = []
        task = tasks([support], self.adapt, self.seed, memory=self.method.info.uses_support)
        adapted = meta_adapt(self.method, self.adapt, task, self.rates or None, graph=True, losses=inner)
        with in_place(self.method, adapted):
            return self.method.loss(query, [support]), inner

    def state(self, done: int) -> dict[str, Any]:
        """As an ordinary training's, with the rates."""
        return {**super().state(done), "rates": {name: rate.detach() for name, rate in self.rates.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        super().load(state)
        with torch.no_grad():
            for name, rate in self.rates.items():
                rate.copy_(state["rates"][name])

    def identity(self) -> dict[str, Any]:
        """What must be equal for a training to be continued."""
        adapt = {name: getattr(self.adapt, name) for name in ("strategy", "steps", "lr", "first_order")}
        return {**super().identity(), **{f"inner {name}": value for name, value in adapt.items()}}
