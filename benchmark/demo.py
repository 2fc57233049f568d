"""`demo`: CMA, its ablations and the controls on the built-in benchmark, from the data to tables and a picture."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from fewref.benchmark.commands import RunOptions, run_folder, run_groups, train_group
from fewref.benchmark.inputs import open_dataset
from fewref.benchmark.picture import write_picture
from fewref.benchmark.results import load
from fewref.benchmark.table import show, views, wide, write_tables
from fewref.episodes.errors import InputError

DATASET, GROUPS, METHOD = "builtin", ("1", "2", "3", "4"), "cma"
PICTURED = ("copy-support", METHOD)
ASKED = (
    *({"method": name} for name in ("empty", "random", "copy-support", "oracle", METHOD)),
    {"method": METHOD, "text": "other"},
    {"method": METHOD, "support": "other-category"},
)
ABLATIONS = ({"method": METHOD, "text": "empty"}, {"method": METHOD, "support": "none"})


def demo(out: Path, draws: int, more: bool, retrain: bool, groups: tuple[str, ...] = GROUPS) -> int:
    """Evaluate on the first `draws` of five support draws, write tables and picture.png to `out`, print the tables.

    more: also with an empty sentence and without a support. retrain: make the checkpoints again first, below
    `out`/train, and use these. Returns 3 where queries failed. Raises InputError for bad options and unwritable places.
    """
    index = open_dataset(DATASET, None)
    trained = {group: str(path) for group, path in retrained(out, groups).items()} if retrain else {}
    plans = [
        RunOptions(
            **asked,
            dataset=DATASET,
            group=group,
            weights=trained.get(group) if asked["method"] == METHOD else None,
            draws=draws,
            workers=0,
            out=Path(out) / "runs",
            progress=False,
        )
        for asked in (ASKED + ABLATIONS if more else ASKED)
        for group in groups
    ]
    failed = run_all(plans)
    folders = [run_folder(plan, plan.group) for plan in plans]
    pictured = [
        run_folder(plan, plan.group)
        for group in groups
        for plan in plans
        if (plan.group, plan.text, plan.support) == (group, "right", "right") and plan.method in PICTURED
    ]
    files = [*write_tables(folders, out), write_picture(Path(out) / "picture.png", pictured, {DATASET: index})]
    for title, table in views(wide(load(folders))):
        print(f"\n{title}\n{show(table, 'simple')}")
    print("\n" + "\n".join(map(str, files)))
    return 3 if failed else 0


def run_all(plans: list[RunOptions]) -> int:
    """Run everything planned, a process for each core; returns how many queries failed. Raises the first InputError."""
    spawn = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(min(cores, len(plans)), spawn, _one_thread) as pool:
        jobs = [pool.submit(run_groups, plan) for plan in plans]
        failed = 0
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), unit="run", desc="demo"):
                failed += sum(result.failed for result in job.result())
        except InputError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _one_thread() -> None:
    torch.set_num_threads(1)


def retrained(out: Path, groups: tuple[str, ...]) -> dict[str, Path]:
    """Train as the shipped checkpoints were: once on the pretraining set, from there on each group's base categories.

    Returns group -> weights, below `out`/train. A training that was stopped goes on.
    """
    common = {"method": METHOD, "data_root": None, "config": "tiny", "seed": 0}
    folder = Path(out) / "train"
    name = f"{METHOD}-builtin-pretrain-none"
    start = train_group(**common, dataset="builtin-pretrain", group="none", out=folder / name)
    return {
        group: train_group(
            **common, dataset=DATASET, group=group, init=start, out=folder / f"{METHOD}-{DATASET}-{group}"
        )
        for group in groups
    }
