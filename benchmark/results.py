"""Runs on disk become one dataframe: a line per query, scoring protocol and run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fewref.benchmark.scoring import get_scoring
from fewref.benchmark.store import COSTS, MANIFEST, Row, read_header, read_rows
from fewref.episodes.errors import InputError
from fewref.episodes.manifest import read_manifest
from fewref.episodes.types import canonical_json
from fewref.methods.adaptation.options import TRANSDUCTIVE, AdaptOptions

SECTION = ["dataset", "episodes", "scoring"]
KEY = ["group", "category", "seed", "episode", "query"]
SETTINGS = ("config", "precision", "run_window", "method_seed")
ADAPTED = tuple(f"set_{field.name}" for field in dataclasses.fields(AdaptOptions) if field.name != "strategy")
LAST_RESORT = ("extras", "device", "version", "checkpoint")


def load(folders: Sequence[Path | str], scoring: str | None = None, partial: bool = False) -> pd.DataFrame:
    """One line per query, scoring protocol and run, sorted; the same for every order of the folders.

    scoring: only this protocol; None takes all that each run was scored under. partial: take unfinished runs too.
    Columns: of the query, those of `Row` with `j`, `f`, `jf` in [0,1], `inter`, `union` in pixels (NaN if failed); of
    the run, those of `run_columns`; `base` (method and what tells it from its like), `ablation` ("" for none) and
    `entry`, their join: runs of one entry over several groups belong together.
    Raises InputError for a folder without a run or with an unfinished one, a protocol that a run lacks, runs of one
    group with different manifests, and two runs that only their folder tells apart.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise InputError("no run folder is named; give the folders that `run --out` wrote")
    if scoring is not None:
        get_scoring(scoring)
    names = run_names(folders)
    parts = [_load_run(folder, name, scoring, partial) for folder, name in zip(folders, names, strict=True)]
    frame = pd.concat(parts, ignore_index=True)
    runs = frame.drop_duplicates(["folder", "scoring"]).sort_values([*SECTION, "method", "group", "folder"])
    check_same_questions(runs)
    named = name_entries(runs)[["folder", "scoring", "base", "ablation", "entry"]]
    frame = frame.merge(named, on=["folder", "scoring"], validate="many_to_one")
    return frame.sort_values([*SECTION, "entry", *KEY], kind="stable", ignore_index=True)


def run_names(folders: Sequence[Path]) -> list[str]:
    """Folders as they are called in tables: relative to what contains all of them. Raises InputError for one twice."""
    whole = [Path(folder).resolve() for folder in folders]
    for number, folder in enumerate(whole):
        if folder in whole[:number]:
            raise InputError(f"{folders[number]}: is named twice; name each run once")
    top = os.path.commonpath([folder.parent for folder in whole])
    return [folder.relative_to(top).as_posix() for folder in whole]


def run_columns(folder: Path) -> dict[str, Any]:
    """What a table says of a run beside its rows: identity, settings and provenance, from header and manifest.

    adaptation: strategy, "none" too; set_<option>: its `AdaptOptions` as JSON, "" without; transductive: whether it saw
    the query's frames while it adapted. asked: queries in its manifest; run_notes: remarks of the manifest, joined.
    Raises InputError for a folder without a run, or a header that is damaged or of another manifest.
    """
    header, manifest = read_header(folder), read_manifest(Path(folder) / MANIFEST)
    try:
        defines, environment = header["defines"], header["environment"]
        git = environment["git"]
        columns = {name: defines[name] for name in ("config", "precision", "device", "version", "text", "support")}
        columns |= {name: defines[name] for name in ("sees_truth", "parameters", "dataset")}
        columns |= {
            "run": header["run"],
            "run_window": defines["window"],
            "method_seed": defines["seed"],
            "extras": canonical_json(defines["extras"]),
            "checkpoint": (defines["checkpoint_sha256"] or "")[:12],
            "manifest": defines["manifest_hash"],
            "episodes": describe_episodes(defines["episodes"]),
            **adaptation_columns(defines.get("adaptation") or {}),
            "rescored_from": defines.get("rescored_from", ""),
            "git": git["sha"][:12] + (" modified" if git["dirty"] else "") if git else "",
            "torch": environment["libraries"]["torch"] or "",
            "device_name": environment["device"],
            "kernels": canonical_json(environment["kernels"]).strip('"'),
            "peak_memory": environment["peak_memory"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: its header is damaged or of another version ({error!r}); run it again") from None
    if columns["manifest"] != manifest.hash:
        raise InputError(f"{folder}: {MANIFEST} is not the one of its header; restore it or run it again")
    asked = sum(len(episode.queries) for episode in manifest.episodes)
    return columns | {"asked": asked, "run_notes": "; ".join(manifest.notes)}


def adaptation_columns(options: dict[str, Any]) -> dict[str, Any]:
    """The columns of a header's `adaptation`; {} for none."""
    strategy = options.get("strategy", "none")
    values = {name: options.get(name.removeprefix("set_")) for name in ADAPTED}
    settings = {name: "" if value is None else canonical_json(value) for name, value in values.items()}
    return {"adaptation": strategy, "transductive": strategy in TRANSDUCTIVE, **settings}


def describe_episodes(protocol: dict[str, Any]) -> str:
    """An episode protocol in words: its name and, in parentheses, its parameters."""
    shown = [
        f"{name} {value}"
        for name, value in sorted(protocol.items())
        if name != "name" and (name, value) != ("episodes", 0)
    ]
    return f"{protocol['name']} ({', '.join(shown).replace('_', ' ')})"


def _load_run(folder: Path, name: str, scoring: str | None, partial: bool) -> pd.DataFrame:
    columns, rows = run_columns(folder), read_rows(folder, partial)
    known = read_header(folder)["defines"]["scoring"]
    if scoring is not None and scoring not in known:
        raise InputError(f"{folder}: was scored by {', '.join(known)}, not {scoring}; use `score` for that")
    if not rows:
        raise InputError(f"{folder}: no query is finished yet; start the same command again")
    wanted = known if scoring is None else [scoring]
    return pd.DataFrame([_line(row, protocol, folder) for protocol in wanted for row in rows]).assign(
        folder=name, **columns
    )


def _line(row: Row, scoring: str, folder: Path) -> dict[str, Any]:
    names = ("episode", "group", "category", "seed", "query", "video", "method", "status", "frames", "window")
    line = {name: getattr(row, name) for name in (*names, *COSTS, "adapt_steps", "adapt_trained")}
    line |= {"scoring": scoring, "j": 0.0, "f": 0.0, "inter": np.nan, "union": np.nan, "resized": False}
    if row.status == "ok":
        if scoring not in row.scores:
            raise InputError(f"{folder}: row of {row.query} has no {scoring} score; use `score` on its predictions")
        line["j"], line["f"] = row.means(scoring)
        line |= {name: row.scores[scoring][name] for name in ("inter", "union", "resized")}
    return line | {"jf": (line["j"] + line["f"]) / 2}


def check_same_questions(runs: pd.DataFrame) -> None:
    """Raises InputError, naming two runs, where runs of one dataset, protocol and group have different manifests."""
    for (dataset, _, _, group), same in runs.groupby([*SECTION, "group"]):
        other = same[same["manifest"] != same["manifest"].iloc[0]]
        if len(other):
            a, b = same.iloc[0], other.iloc[0]
            raise InputError(
                f"{a['folder']} and {b['folder']}: ask different questions about {dataset}, group {group} (manifests "
                f"{a['manifest'][:12]} and {b['manifest'][:12]}); run both on one manifest, or leave one out"
            )


def name_entries(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, one line per folder and scoring protocol, with `base`, `ablation` and `entry`.

    `base` is the method with its adaptation, "cma + finetune"; settings appear in it only where runs differ in them.
    Where two runs of one group are left alike, extras, device, version and, for a single group, the checkpoint tell
    them apart. Raises InputError if nothing does.
    """
    runs = runs.reset_index(drop=True)
    modes = runs[["text", "support"]].to_dict("records")
    changed = [", ".join(f"{name} {mode}" for name, mode in run.items() if mode != "right") for run in modes]
    strategies = runs["adaptation"].map(lambda name: "" if name == "none" else f" + {name}")
    runs = runs.assign(base=runs["method"] + strategies, ablation=changed)
    for columns, settings in (([], SETTINGS), (["adaptation"], ADAPTED)):
        for lines in _groups(runs, [*SECTION, "method", *columns]):
            for name in settings:
                _tell_apart(runs, lines, name)
    for lines in _groups(runs, [*SECTION, "base"]):
        same = runs.loc[lines].duplicated(["ablation", "group"], keep=False)
        for name in LAST_RESORT:
            if same.any() and (name != "checkpoint" or runs.loc[lines, "group"].nunique() == 1):
                _tell_apart(runs, lines, name)
                same = runs.loc[lines].duplicated(["base", "ablation", "group"], keep=False)
        if same.any():
            a, b = runs.loc[lines][same].sort_values(["ablation", "group"]).iloc[:2].to_dict("records")
            raise InputError(
                f"{a['folder']} and {b['folder']}: both are {a['method']} on {a['dataset']}, group {a['group']}; leave "
                "one out, or hold them against each other with `compare`"
            )
    endings = runs["ablation"].map(lambda text: f" [{text}]" if text else "")
    return runs.assign(entry=runs["base"] + endings)


def _groups(runs: pd.DataFrame, columns: list[str]) -> list[pd.Index]:
    return [part.index for _, part in runs.groupby(columns)]


def _tell_apart(runs: pd.DataFrame, lines: pd.Index, name: str) -> None:
    """Add the value of column `name` to the `base` of these lines where it is not the same in all."""
    if runs.loc[lines, name].nunique() > 1:
        called = name.removeprefix("run_").removeprefix("method_").removeprefix("set_")
        values = [f"{base}, {called} {value or 'none'}" for base, value in runs.loc[lines, ["base", name]].to_numpy()]
        runs.loc[lines, "base"] = values
