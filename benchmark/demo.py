"""`demo`: CMA, its ablations and the controls on the built-in benchmark, from the data to tables and a picture.

With `leaderboard` every method that has shipped checkpoints, with and without adaptation.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewref.benchmark.commands import RunOptions, run_folder, train_group
from fewref.benchmark.inputs import open_dataset
from fewref.benchmark.matrix import called, check_possible, count_jobs, run_all
from fewref.benchmark.meta_train import meta_train
from fewref.benchmark.picture import write_picture
from fewref.benchmark.results import load
from fewref.benchmark.table import show, views, wide, write_tables
from fewref.episodes.errors import InputError
from fewref.methods.adaptation.options import META
from fewref.methods.registry import METHODS, load_method
from fewref.methods.shipped import shipped_folder, shipped_names

DATASET, GROUPS, METHOD = "builtin", ("1", "2", "3", "4"), "cma"
PICTURED = ("copy-support", METHOD)
QUERIES, LEADERBOARD_QUERIES = 12, 8  # asked per episode: minutes on two cores
META_METHOD = "referformer"  # the one that is shipped meta-learned: without adapting it has no use for a support
# How the shipped checkpoints were trained, where that is not the method's own pretraining and configuration.
PRETRAINED = {"cma-self": "cma", "cma-base": "cma", "tf2": "referformer"}
CHANGES = {"cma-self": {"steps": 700}, "cma-base": {"steps": 700}}
META_STEPS = 100
CONTROLS = tuple({"method": name} for name in METHODS if load_method(name).info.kind == "control")
ASKED = (
    *CONTROLS,
    {"method": METHOD},
    {"method": METHOD, "text": "other"},
    {"method": METHOD, "support": "other-category"},
)
ABLATIONS = ({"method": METHOD, "text": "empty"}, {"method": METHOD, "support": "none"})


def demo(
    out: Path,
    draws: int,
    leaderboard: bool,
    retrain: bool,
    queries: int | None = None,
    groups: tuple[str, ...] = GROUPS,
) -> int:
    """Evaluate on the first `draws` of five support draws, write tables and picture.png to `out`, print the tables.

    leaderboard: ask every method with and without fine-tuning, prototypes and all ablations. retrain: make the
    checkpoints again first, below `out`/train, and use these. queries: asked per episode; None asks `QUERIES`, or
    `LEADERBOARD_QUERIES`. What lacks a checkpoint is left out with a line on stderr.
    Returns 3 where queries failed. Raises InputError for bad options and unwritable places.
    """
    index = open_dataset(DATASET, None)
    chosen = possible(leaderboard_rows() if leaderboard else [*ASKED, *meta_rows(groups)], groups)
    trained = retrained(out, groups, chosen) if retrain else {}
    plans = [
        RunOptions(
            **row,
            dataset=DATASET,
            group=group,
            weights=trained.get((checkpoint_of(row), group)),
            draws=draws,
            queries=queries if queries is not None else LEADERBOARD_QUERIES if leaderboard else QUERIES,
            out=Path(out) / "runs",
            workers=0,
        )
        for row in chosen
        for group in groups
    ]
    failed = sum(result.failed for result in run_all(plans, count_jobs(None, "auto"), "demo"))
    folders = [run_folder(plan, plan.group) for plan in plans]
    pictured = [
        run_folder(plan, plan.group)
        for group in groups
        for plan in plans
        if (plan.group, plan.text, plan.support, plan.adapt) == (group, "right", "right", "none")
        and plan.method in PICTURED
    ]
    files = [*write_tables(folders, out), write_picture(Path(out) / "picture.png", pictured, {DATASET: index})]
    for title, table in views(wide(load(folders))):
        print(f"\n{title}\n{show(table, 'simple')}")
    print("\n" + "\n".join(map(str, files)))
    return 3 if failed else 0


def leaderboard_rows() -> list[dict[str, Any]]:
    """All that the leaderboard has, whether it is possible here or not."""
    networks = [name for name in METHODS if {"method": name} not in CONTROLS]
    adapted = [{"method": name, "adapt": strategy} for name in networks for strategy in ("none", "finetune")]
    pooled = {"method": METHOD, "adapt": "prototype"}
    return [*CONTROLS, *adapted, pooled, *meta_rows(GROUPS)[1:], *ASKED[len(CONTROLS) + 1 :], *ABLATIONS]


def meta_rows(groups: Sequence[str]) -> list[dict[str, Any]]:
    """The meta-learned rows that have a checkpoint for every group, after the row of the same method without."""
    known = shipped_names()
    learned = [
        {"method": META_METHOD, "adapt": strategy}
        for strategy in META
        if all(shipped_folder(f"{META_METHOD}+{strategy}", DATASET, group).name in known for group in groups)
    ]
    return [{"method": META_METHOD}, *learned] if learned else []


def possible(rows: Sequence[dict[str, Any]], groups: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that have their checkpoints and libraries; a line on stderr for each other one."""
    kept = []
    for row in rows:
        strategy = row.get("adapt", "none")
        try:
            check_possible(row["method"], strategy, RunOptions(row["method"], dataset=DATASET), groups)
            kept.append(row)
        except InputError as error:
            print(f"left out: {called(row['method'], strategy)}: {error}", file=sys.stderr)
    return kept


def checkpoint_of(row: Mapping[str, Any]) -> str:
    """Whose checkpoint a row uses: its method's, or that of method and strategy where it is meta-learned."""
    strategy = row.get("adapt", "none")
    return f"{row['method']}+{strategy}" if strategy in META else row["method"]


def retrained(out: Path, groups: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Train as the shipped checkpoints were: on the pretraining set, from there on each group's base categories, and
    from there once more for what is meta-learned.

    Returns (`checkpoint_of` a row, group) -> weights, below `out`/train. A training that was stopped goes on.
    """
    folder, found = Path(out) / "train", {}
    wanted = {checkpoint_of(row) for row in rows if load_method(row["method"]).info.needs_weights}
    for name in sorted(wanted):
        method, _, meta = name.partition("+")
        first = PRETRAINED.get(method, method)
        common = {"data_root": None, "config": "tiny", "seed": 0}
        pretraining = {"method": first, "dataset": "builtin-pretrain", "group": "none"}
        start = train_group(**pretraining, **common, out=folder / f"{first}-builtin-pretrain-none")
        for group in groups:
            common |= {"method": method, "dataset": DATASET, "group": group}
            where = folder / f"{method}-{DATASET}-{group}"
            weights = train_group(**common, init=start, changes=CHANGES.get(method), out=where)
            if meta:
                where = folder / f"{name}-{DATASET}-{group}"
                weights = meta_train(**common, meta=meta, steps=META_STEPS, init=weights, out=where)
            found[name, group] = str(weights)
    return found
