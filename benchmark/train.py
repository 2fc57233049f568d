"""The training loop: one or many processes, checkpoints to continue from, a CSV of losses."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from tqdm import tqdm

import fewref
from fewref.benchmark.provenance import git_state
from fewref.benchmark.recipe import (
    FREE,
    TrainOptions,
    build_optimiser,
    load_optimiser,
    rate,
    read_options,
    strays,
    total_steps,
)
from fewref.benchmark.train_data import EpisodeSource, PixelCache, Pools, batches, group_videos
from fewref.episodes.draws import generator
from fewref.episodes.errors import InputError, write_atomic
from fewref.episodes.readers import DatasetIndex
from fewref.methods.batch import Batch
from fewref.methods.checkpointing import checkpointed
from fewref.methods.layers.losses import criterion
from fewref.methods.layers.matcher import LossWeights
from fewref.methods.weights import Tied, save_checkpoint


class EpisodeNetwork(nn.Module):
    """A network as a module whose forward takes a `Batch`, which is what the processes of a training share."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> dict:
        """What the network's `episode` returns."""
        return self.network.episode(batch)


def train(
    *,
    network: nn.Module,
    tokenizer: Callable,
    index: DatasetIndex,
    pools: Pools,
    config: Mapping[str, object],
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    steps: int | None = None,
    resume: bool = True,
    tied: Tied = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Train a network on episodes of base classes; returns the path of the final weights.

    network: its `episode` takes a `Batch` and returns the outputs that `criterion` takes; trained in place; tokenizer:
    sentences -> (ids, attention); pools: from `training_pools`; config: fields of `TrainOptions`; steps: stop early
    after that many steps in all, the schedule unchanged; resume: go on from `out`/last.pt where there is one.
    tied, metadata: for `save_checkpoint`. Under torchrun every process takes its share of each batch.
    Writes `out`/last.pt (to continue from), losses.csv, and at the end weights.safetensors.
    Raises InputError for bad options, unreadable data, a checkpoint of another training, and a loss that is no number.
    """
    options, out = read_options(config), Path(out)
    with processes(device, options.batch) as (place, rank, world), ExitStack() as stack:
        if options.checkpointing:
            stack.enter_context(checkpointed(network))
        source = episode_source(index, pools, options, seed, rank == 0)
        network.to(place).train()
        run = Training(network, options, seed, out, list(source.videos), place, rank)
        done = run.restore() if resume else 0
        last = total_steps(options, len(source.videos))
        last = min(last, steps) if steps else last
        model: nn.Module = EpisodeNetwork(network)
        if world > 1:
            model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
        log = LossLog(out / "losses.csv", done, rank, world)
        loader = batches(source, tokenizer, done, last, rank, world)
        done = run.loop(loader, lambda step, batch: run.step(step, model, batch.to(place), log), log, done, last)
        if rank == 0:
            run.write_weights(done, tied, metadata)
        return run.weights


def episode_source(
    index: DatasetIndex, pools: Pools, options: TrainOptions, seed: int, tell: bool = True
) -> EpisodeSource:
    """The episodes of a training; says on the error stream which categories have too few videos for one."""
    source = EpisodeSource(PixelCache(index, options.cache_bytes, options.size), group_videos(pools), options, seed)
    if tell and (lonely := [name for name in pools if name not in source.videos]):
        print(f"not trained on, having fewer than two videos: {', '.join(lonely)}", file=sys.stderr)
    return source


@dataclass
class Training:
    """What a step changes, and how it is written down and taken up again."""

    network: nn.Module
    options: TrainOptions
    seed: int
    out: Path
    classes: list[str]
    device: torch.device
    rank: int = 0
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimiser = build_optimiser(self.network, self.options)

    @property
    def weights(self) -> Path:
        """Where the final weights go."""
        return self.out / "weights.safetensors"

    def loop(self, samples: Iterable[tuple[int, Any]], act: Callable, log: LossLog, done: int, last: int) -> int:
        """Call act(step, sample) for every pair, writing losses and last.pt in between; returns the steps done."""
        with tqdm(samples, total=last, initial=done, unit="step", disable=self.rank > 0) as bar:
            for step, sample in bar:
                act(step, sample)
                done = step + 1
                if done % self.options.log_every == 0 or done == last:
                    bar.set_postfix(log.flush())
                if done % self.options.save_every == 0 or done == last:
                    log.flush()
                    self.save(done)
        return done

    def step(self, step: int, model: nn.Module, batch: Batch, log: LossLog) -> None:
        """One update of the network."""
        lr = self.begin(step)
        total, terms = self.loss(model, batch)
        total.backward()
        self.update()
        log.add(step + 1, lr, {"total": total.detach(), **terms})

    def begin(self, step: int) -> float:
        """Set what follows from the number of a step (from 0) alone; returns its learning rate."""
        # Dropout follows from the step alone, so a continued training draws what an unbroken one would have drawn.
        torch.manual_seed(int(generator(self.seed, "dropout", step, self.rank).integers(2**62)))
        factor = rate(step, self.options, len(self.classes))
        for group in self.optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimiser.zero_grad()
        return self.options.lr * factor

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and terms, each (), of a batch on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            outputs = model(batch)
        weights, matching = LossWeights(**self.options.loss_weights), LossWeights()
        return criterion(outputs, batch.targets, weights, matching, self.network.classify_valid)

    def update(self) -> None:
        """Clip the gradients and let the optimiser make its step."""
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_norm)
        self.optimiser.step()

    def write_weights(self, done: int, tied: Tied, metadata: Mapping[str, str] | None) -> None:
        """Write the weights after `done` steps, with how they were made."""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        entries = {"command": command, "seed": str(self.seed), "steps": str(done), **provenance()}
        dtype = torch.float16 if self.options.half_weights else torch.float32
        save_checkpoint(self.weights, self.network.state_dict(), {**entries, **(metadata or {})}, dtype, tied)

    def save(self, done: int) -> None:
        """Write last.pt after `done` steps, whole or not at all."""
        if self.rank:
            return
        buffer = io.BytesIO()
        torch.save(self.state(done), buffer)
        write_atomic(self.out / "last.pt", buffer.getvalue())

    def state(self, done: int) -> dict:
        """What last.pt holds after `done` steps."""
        return {
            "step": done,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "strays": strays(self.network, self.optimiser),
            # All random numbers follow from the seed and the step.
            "rng": {"seed": self.seed, "step": done},
            "identity": self.identity(),
        }

    def load(self, state: dict) -> None:
        """Take up what `state` gave."""
        self.network.load_state_dict(state["network"])
        load_optimiser(self.optimiser, state["optimiser"])
        parameters = dict(self.network.named_parameters())
        for name, gradient in state["strays"].items():
            parameters[name].grad = gradient

    def identity(self) -> dict:
        """What must be equal for a training to be continued."""
        values = {k: v for k, v in dataclasses.asdict(self.options).items() if k not in FREE}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {**values, "seed": self.seed, "classes": self.classes}

    def restore(self) -> int:
        """Take up last.pt; returns the number of finished steps, 0 where there is no such file.

        Raises InputError for a damaged file and for one of a training with other options, seed or classes.
        """
        path = self.out / "last.pt"
        if not path.exists():
            return 0
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            saved, own = state["identity"], self.identity()
            if differing := [name for name in own if saved.get(name) != own[name]]:
                raise InputError(
                    f"{path}: belongs to a training with another {', '.join(differing)}; "
                    "choose another output folder, or start anew without resuming"
                )
            self.load(state)
        except InputError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: cannot be continued from ({reason}); start anew without resuming") from None
        return state["step"]


class LossLog:
    """losses.csv: one row per step with its learning rate, total, terms and seconds.

    Rows are kept on the device until `flush`, so that a step does not wait for the one before it.
    """

    def __init__(self, path: Path, done: int, rank: int = 0, world: int = 1) -> None:
        self.path, self.rank, self.world = path, rank, world
        self.names: list[str] = []
        self.rows: list[tuple[int, float, float, Tensor]] = []
        self.clock = time.perf_counter()
        if rank == 0:
            self._cut(done)

    def _cut(self, done: int) -> None:
        """Drop rows of steps that are going to be repeated, so that none stands twice."""
        lines = self.path.read_text().splitlines(keepends=True) if done and self.path.exists() else []
        kept = lines[:1] + [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= done]
        write_atomic(self.path, "".join(kept))

    def add(self, step: int, lr: float, terms: Mapping[str, Tensor]) -> None:
        """Note a finished step (from 1); terms: tensors ()."""
        now = time.perf_counter()
        self.names = list(terms)
        self.rows.append((step, lr, now - self.clock, torch.stack([value.float() for value in terms.values()])))
        self.clock = now

    def flush(self) -> dict[str, str]:
        """Write what was noted; returns short figures of the last layer, averaged, for the progress bar.

        Raises InputError naming the first step whose loss is not finite.
        """
        if not self.rows:
            return {}
        values = torch.stack([row[3] for row in self.rows])
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world
        values = values.cpu()
        steps, rates, seconds, _ = zip(*self.rows, strict=True)
        self.rows = []
        finite = values.isfinite().all(1)
        if not finite.all():
            step = steps[int(finite.int().argmin())]
            raise InputError(f"{self.path}: the loss of step {step} is not finite; lower the learning rate (option lr)")
        if self.rank == 0:
            self._append(zip(steps, rates, values.tolist(), seconds, strict=True))
        means = dict(zip(self.names, values.mean(0).tolist(), strict=True))
        return {name.removeprefix("loss_"): f"{means[name]:.3f}" for name in means if not name[-1].isdigit()}

    def _append(self, rows: Iterator[tuple]) -> None:
        try:
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if not file.tell():
                    writer.writerow(["step", "lr", *self.names, "seconds"])
                for step, lr, values, seconds in rows:
                    writer.writerow([step, f"{lr:.6g}", *(f"{v:.6g}" for v in values), f"{seconds:.4f}"])
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); choose another output folder"
            raise InputError(f"{self.path}: {reason}") from None


@contextmanager
def processes(device: str, batch: int) -> Iterator[tuple[torch.device, int, int]]:
    """(device, rank, number of processes): under torchrun the group that its environment describes, else this one.

    Raises InputError for a GPU that is not there, and for a batch which the processes cannot share evenly.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: no CUDA GPU is usable here; choose cpu")
    if batch % world:
        raise InputError(f"training option batch: {batch} episodes cannot be shared by {world} processes evenly")
    if world == 1:
        yield torch.device(device), 0, 1
        return
    place = torch.device(device)
    if kind == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    started = not distributed.is_initialized()
    if started:
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield place, rank, world
    finally:
        if started:
            distributed.destroy_process_group()


def provenance() -> dict[str, str]:
    """Version and git state of this project, as text."""
    state = git_state(Path(fewref.__file__).resolve().parent)
    return {"version": fewref.__version__, **{f"git_{name}": str(value) for name, value in (state or {}).items()}}
