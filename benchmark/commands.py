"""What the commands do, one function each; parsing is in run_benchmark.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewref.benchmark.inputs import (
    choose_device,
    choose_groups,
    fewer_queries,
    find_runs,
    first_draws,
    get_manifest,
    load_manifests,
    open_dataset,
)
from fewref.benchmark.picture import write_picture
from fewref.benchmark.protocol import get_protocol
from fewref.benchmark.recipe import read_options
from fewref.benchmark.rescore import score_stored
from fewref.benchmark.runner import RunResult, run
from fewref.benchmark.store import MANIFEST, read_header
from fewref.benchmark.train import train
from fewref.benchmark.training_record import base_videos, option_words, start_name, write_record
from fewref.episodes import leakage
from fewref.episodes.check import check_dataset
from fewref.episodes.checksums import verify_checksums, write_checksums
from fewref.episodes.errors import InputError, near
from fewref.episodes.manifest import Manifest, read_manifest, write_manifest
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.sampler import build_manifest, episode_protocol
from fewref.kernels.dispatch import report as report_kernels
from fewref.kernels.dispatch import using
from fewref.methods.adaptation.options import adapt_options
from fewref.methods.base import Method
from fewref.methods.registry import load_method
from fewref.methods.shipped import find_weights
from fewref.splits import load_split

BATCH = {"cpu": 1, "cuda": 4}  # windows at once: more of them fill a GPU, and a CPU is full with one


@dataclass(frozen=True)
class RunOptions:
    """Everything that `run` can be told of one method; see the command's help.

    out: base folder; runs lie below it, one per group. changes: fields of `EpisodeProtocol`; adapt_changes: of
    `AdaptOptions`. tag: end of the folder's name, of a run that one setting tells from others of a matrix. batch: None
    is `BATCH` of the device. kernels: None leaves the choice to `fewref.kernels.dispatch`.
    """

    method: str
    dataset: str = "builtin"
    data_root: Path | None = None
    group: str = "all"
    weights: str | None = None
    config: str = "tiny"
    protocol: str = "group"
    scoring: tuple[str, ...] = ()
    manifest: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    draws: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    window: int = 10
    seed: int = 0
    text: str = "right"
    support: str = "right"
    shard: tuple[int, int] | None = None
    workers: int = 1
    out: Path | None = None
    progress: bool = True
    queries: int | None = None
    adapt: str = "none"
    adapt_changes: dict[str, Any] = field(default_factory=dict)
    tag: str = ""
    batch: int | None = None
    kernels: str | None = None
    compile: bool = False


def run_folder(options: RunOptions, group: str) -> Path:
    """`runs/<dataset>-<protocol>/<method, adaptation and ablations>/group-<g>`, or the last two parts below `--out`.

    Another number of shots than the protocol's is told by the first part.
    """
    label = options.method.replace(":", ".") + (f"+{options.adapt}" if options.adapt != "none" else "") + options.tag
    label += "".join(f"-{kind}-{mode}" for kind, mode in _ablations(options))
    shots, default = options.changes.get("shots"), get_protocol(options.protocol).episodes.shots
    name = f"{options.dataset}-{options.protocol}" + (f"-shots{shots}" if shots not in (None, default) else "")
    return (options.out or Path("runs") / name) / label / f"group-{group}"


def _ablations(options: RunOptions) -> list[tuple[str, str]]:
    return [(kind, mode) for kind, mode in (("text", options.text), ("support", options.support)) if mode != "right"]


def check_settings(options: RunOptions) -> None:
    """Raises InputError for settings that no method could be run with."""
    get_protocol(options.protocol)
    choose_device(options.device)
    if options.precision not in ("fp32", "bf16"):
        raise InputError(f"--precision {options.precision!r}: {near(options.precision, ('fp32', 'bf16'))}")
    if options.window < 1:
        raise InputError(f"--window {options.window}: a window has at least one frame")
    if options.batch is not None and options.batch < 1:
        raise InputError(f"--batch {options.batch}: at least one window is computed at once")
    check_kernels(options.kernels, options.device)


def check_kernels(kernels: str | None, device: str) -> None:
    """Raises InputError where operators are forced to kernels that are unknown or cannot run on the device."""
    try:
        with using(kernels):
            report_kernels(choose_device(device))
    except ValueError as error:
        raise InputError(f"--{error}" if kernels else str(error)) from None  # it begins with "kernels NAME"


def chosen_episodes(options: RunOptions, index: DatasetIndex) -> dict[str, Manifest]:
    """Group -> the episodes to ask. Raises InputError for unknown groups and a manifest of other data."""
    protocol, wanted = get_protocol(options.protocol), options.group
    if options.manifest and wanted == "all":
        wanted = read_manifest(options.manifest).group
    found = {}
    for group in choose_groups(index, wanted):
        manifest = get_manifest(index, group, protocol, options.changes, options.manifest)
        found[group] = fewer_queries(first_draws(manifest, options.draws), options.queries)
    return found


def run_groups(options: RunOptions) -> list[RunResult]:
    """Run a method on each group asked for, one run folder each. Raises InputError for bad options and data."""
    cls = load_method(options.method)
    check_settings(options)
    protocol = get_protocol(options.protocol)
    index = open_dataset(options.dataset, options.data_root)
    manifests, weights = chosen_episodes(options, index), {}
    if cls.info.needs_weights:
        names = options.method, options.weights, options.config, options.dataset
        weights = {group: find_weights(*names, group, options.adapt) for group in manifests}
    extras = {"protocol": protocol.name} | ({"kernels": options.kernels} if options.kernels else {})
    with using(options.kernels):
        return [
            run(
                method=build_method(cls, options, weights.get(group)),
                method_name=options.method,
                manifest=manifest,
                index=index,
                out=run_folder(options, group),
                scoring=options.scoring or (protocol.scoring,),
                extras=extras,
                text=options.text,
                support=options.support,
                shard=options.shard,
                workers=options.workers,
                progress=options.progress,
            )
            for group, manifest in manifests.items()
        ]


def build_method(cls: type[Method], options: RunOptions, weights: Path | str | None) -> Method:
    """The method, inside of the adaptation strategy that is asked for. Raises InputError where the two do not fit."""
    device = choose_device(options.device)
    method = cls(
        weights=weights,
        config=options.config,
        device=device,
        precision=options.precision,
        window=options.window,
        seed=options.seed,
        batch=options.batch or BATCH[torch.device(device).type],
        compile=options.compile,
    )
    if options.adapt == "none":
        return method
    from fewref.methods.adaptation.adapted import wrap

    defaults = getattr(method, "adapt_defaults", {}).get(options.adapt, {})
    return wrap(method, adapt_options(options.adapt, defaults, options.adapt_changes))


def train_group(
    *,
    method: str,
    dataset: str,
    data_root: Path | None,
    group: str,
    config: str,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    init: Path | None = None,
    resume: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Train a method on the base categories of one group; returns the path of the weights.

    changes: fields of `TrainOptions` that differ from the configuration.
    Writes below `out` what `train` writes, and training.json: command, seed, configuration, categories, loss curve.
    Raises InputError for bad options and data.
    """
    device = choose_device(device)
    check_kernels(None, device)
    torch.manual_seed(seed)
    parts = load_method(method).training(config, init)
    options = {**parts.options, **(changes or {})}
    read_options(options)  # says at once what is wrong with them
    index = open_dataset(dataset, data_root)
    group, pools = base_videos(index, group)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    words = ["torchrun", "--nproc-per-node", str(world), "--no-python"] if world > 1 else []
    words += ["fewref", "train", "--method", method, "--dataset", dataset, "--group", group, "--config", config]
    words += ["--seed", str(seed)] + (["--steps", str(steps)] if steps else [])
    words += ["--init", start_name(init)] if init else []
    command = " ".join(words + option_words(changes or {}))
    weights = train(
        network=parts.network,
        tokenizer=parts.tokenizer,
        index=index,
        pools=pools,
        config=options,
        out=out,
        seed=seed,
        device=device,
        steps=steps,
        resume=resume,
        tied=parts.tied,
        metadata={"command": command, "method": method, "config": config, "group": group},
    )
    if int(os.environ.get("RANK", "0")) == 0:
        write_record(Path(out), command=command, seed=seed, options=options, index=index, pools=pools)
    return weights


def build_manifests(
    *, dataset: str, data_root: Path | None, group: str, protocol: str, changes: dict[str, Any], out: Path
) -> list[Path]:
    """Draw the episodes of each group asked for and write one manifest each below `out`; returns their paths."""
    index = open_dataset(dataset, data_root)
    name = get_protocol(protocol).episodes.name
    drawn = [
        build_manifest(index, index.split(), g, episode_protocol(name, **changes)) for g in choose_groups(index, group)
    ]
    for manifest in drawn:
        write_manifest(Path(out) / manifest.file_name, manifest)
    return [Path(out) / manifest.file_name for manifest in drawn]


def report(results: Sequence[RunResult]) -> int:
    """Print a line per run; returns the exit code, 3 where queries failed."""
    for result in results:
        failed = f", {result.failed} failed" if result.failed else ""
        print(f"{result.folder}: {len(result.rows)} queries{failed}")
    return max(result.exit_code for result in results)


def rescore(folders: Sequence[Path], data_root: Path | None, scoring: Sequence[str], out: Path, workers: int) -> int:
    """Judge the stored predictions of every run under `folders` again; writes `out`/<last three parts of its path>.

    Raises InputError where two runs would get one name, and as `score_stored`.
    """
    runs = find_runs(folders)
    targets = [out.joinpath(*run.resolve().parts[-3:]) for run in runs]
    if len(set(targets)) < len(targets):
        raise InputError(f"{out}: two runs would be called {targets[0].relative_to(out)}; score them apart")
    for folder, target in zip(runs, targets, strict=True):
        manifest = read_manifest(folder / MANIFEST)
        index = open_dataset(manifest.dataset, data_root)
        score_stored(folder, manifest, index, scoring, target, workers)
        print(target)
    return 0


def draw_picture(folders: Sequence[Path], data_root: Path | None, out: Path) -> Path:
    """Write the picture of the runs under `folders`, all of one dataset; returns its path."""
    runs = find_runs(folders)
    datasets = sorted({read_header(folder)["defines"]["dataset"] for folder in runs})
    if len(datasets) > 1:
        raise InputError(f"the runs are of {' and '.join(datasets)}; draw one dataset at a time")
    return write_picture(out, runs, {datasets[0]: open_dataset(datasets[0], data_root)})


def check_manifests(files: Sequence[Path], data_root: Path | None) -> int:
    """Print leaks and notes of each manifest; returns 1 where one leaks. With data_root it is held against the data."""
    leaks = 0
    for manifest in load_manifests(files):
        index = open_dataset(manifest.dataset, data_root) if data_root else None
        problems = leakage.check(manifest, load_split(manifest.dataset), index)
        leaks += len(problems)
        for line in problems:
            print(f"{manifest.file_name}: LEAK: {line}")
        for line in leakage.notes(manifest, load_split(manifest.dataset), index):
            print(f"{manifest.file_name}: note: {line}")
        asked = sum(len(episode.queries) for episode in manifest.episodes)
        print(f"{manifest.file_name}: {len(problems)} leaks, {len(manifest.episodes)} episodes, {asked} queries")
    return 1 if leaks else 0


def check_data(dataset: str, folder: Path, fast: bool, checksums: str | None, file: Path | None) -> int:
    """Print each fault of a dataset folder, or write or verify its checksums; returns 1 where there are faults.

    Raises InputError where there is no folder, an unknown dataset, and as the checksum functions do.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that holds {dataset}")
    file = file or folder / "checksums.sha256"
    if checksums == "write":
        print(f"{file}: {write_checksums(folder, file)} files")
        return 0
    faults = verify_checksums(folder, file) if checksums else check_dataset(dataset, folder, fast)
    for fault in faults:
        print(fault)
    print(f"{folder}: {len(faults)} {'fault' if len(faults) == 1 else 'faults'}", file=sys.stderr)
    return 1 if faults else 0
