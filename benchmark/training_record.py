"""training.json: how a checkpoint was made; with it, what every training of one group starts with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas

from fewref.benchmark.inputs import choose_groups
from fewref.benchmark.train import provenance
from fewref.benchmark.train_data import Pools
from fewref.episodes.errors import InputError, write_atomic
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.sampler import training_pools

CURVE_STEPS = 50  # steps that one point of a recorded loss curve averages over


def base_videos(index: DatasetIndex, group: str) -> tuple[str, Pools]:
    """The group's full name and the videos of its base categories. Raises InputError for several groups or none."""
    (group, *more) = choose_groups(index, group)
    if more:
        raise InputError(f"--group: a training is of one group, such as {group}")
    return group, training_pools(index, index.split(), group)


def start_name(init: Path) -> str:
    """How a checkpoint to start from is told: by its training where its own name is that of all."""
    return init.parent.name if init.name == "weights.safetensors" else init.name


def option_words(changes: Mapping[str, Any]) -> list[str]:
    """How changed training options are told on the command line."""
    values = {
        name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in changes.items()
    }
    return [word for name, value in values.items() for word in ("--option", f"{name}={value}")]


def write_record(
    out: Path, *, command: str, seed: int, options: Mapping[str, Any], index: DatasetIndex, pools: Pools, **more: Any
) -> None:
    """Write `out`/training.json: command, seed, configuration, categories, loss curve and `more`."""
    record = {
        "command": command,
        "seed": seed,
        "options": dict(options),
        **more,
        "metadata_hash": index.metadata_hash(),
        "base_categories": sorted(pools),
        **provenance(),
        **loss_curve(out / "losses.csv"),
    }
    write_atomic(out / "training.json", json.dumps(record, indent=1) + "\n")


def loss_curve(path: Path) -> dict[str, Any]:
    """From losses.csv: steps, seconds, and the mean of each term of the last layer over every `CURVE_STEPS` steps."""
    losses = pandas.read_csv(path)
    names = [
        name for name in losses.columns if name == "total" or (name.startswith("loss_") and not name[-1].isdigit())
    ]
    blocks = losses[["step", *names]].groupby((losses.step - 1) // CURVE_STEPS)
    means = blocks[names].mean().round(4)
    curve = {"step": blocks["step"].max().tolist(), **{name: means[name].tolist() for name in names}}
    return {"steps": int(losses.step.iloc[-1]), "seconds": round(float(losses.seconds.sum()), 1), "loss_curve": curve}
