"""Score stored predictions again, under other protocols, without the method."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fewref.benchmark.judge import Packed, judge, known_scoring, open_pool, settle
from fewref.benchmark.store import (
    MANIFEST,
    Key,
    Row,
    decode_masks,
    file_name,
    read_header,
    read_predictions,
    read_rows,
    shards_in,
)
from fewref.benchmark.units import Task, tasks_of
from fewref.episodes.errors import InputError, write_atomic
from fewref.episodes.load import load_truth, prefetch
from fewref.episodes.manifest import Manifest, check_matches, write_manifest
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.types import canonical_json


def score_stored(
    folder: Path,
    manifest: Manifest,
    index: DatasetIndex,
    scoring: Sequence[str],
    out: Path,
    workers: int = 1,
    progress: bool = True,
) -> list[Row]:
    """Judge the predictions of a finished run under the named protocols; write `out`, which `read_rows` reads.

    The header of `out` is the run's with the new protocols and `rescored_from`; costs are those of the run. Nothing is
    written before all is scored. Raises InputError where a prediction is missing, is of no query of the manifest, is
    there twice or has not the size of its truth, and where `out` holds a run.
    """
    folder, out, scoring = Path(folder), Path(out), known_scoring(scoring)
    check_matches(manifest, index)
    if shards_in(out):
        raise InputError(f"{out}: holds a run already; choose another output folder")
    header = read_header(folder)
    tasks = tasks_of(manifest)
    predictions = matched_predictions(folder, [task.key for task in tasks])
    rows = {row.key: row for row in read_rows(folder)}
    run = rescored_header(header, manifest, scoring)

    def load(task: Task) -> tuple[Task, np.ndarray]:
        return task, load_truth(index, task.query, task.target)

    made: list[Row] = []
    with open_pool(workers) as pool:
        jobs = (
            (task, pool.submit(judge, scoring, *stored_masks(folder, task.key, predictions[task.key], truth)))
            for task, truth in prefetch(tasks, load)
        )
        settled = tqdm(settle(jobs, depth=2 * workers), total=len(tasks), unit="query", disable=not progress)
        for task, judged in settled:
            made.append(dataclasses.replace(rows[task.key], run=run["run"], scores=judged.scores))
    lines = (canonical_json(dataclasses.asdict(row)) + "\n" for row in made)
    write_atomic(out / file_name("rows", (0, 1)), "".join(lines))
    write_manifest(out / MANIFEST, manifest)
    write_atomic(out / file_name("header", (0, 1)), json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    return made


def rescored_header(header: dict[str, Any], manifest: Manifest, scoring: list[str]) -> dict[str, Any]:
    """The run's header under other scoring protocols. Raises InputError if the run is of another manifest."""
    defines = header["defines"]
    if defines["manifest_hash"] != manifest.hash:
        wanted, given = defines["manifest_hash"][:12], manifest.hash[:12]
        raise InputError(f"the run is of manifest {wanted}, not {given}; give the run's own (its {MANIFEST})")
    defines = {**defines, "scoring": scoring, "rescored_from": header["run"]}
    run = hashlib.sha256(canonical_json(defines).encode()).hexdigest()[:12]
    return {**header, "run": run, "defines": defines}


def matched_predictions(folder: Path, keys: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    """The stored predictions by key, exactly those of `keys`. Raises InputError naming the first that is not so."""
    known, found = set(keys), {}
    for key, line in read_predictions(folder):
        if key not in known:
            raise InputError(f"{folder}: prediction for {key[1]} (episode {key[0]}) is of no query of the manifest")
        if key in found:
            raise InputError(f"{folder}: two predictions for {key[1]} (episode {key[0]}); run it again elsewhere")
        found[key] = line
    if missing := [key for key in keys if key not in found]:
        raise InputError(
            f"{folder}: no prediction for {missing[0][1]} (episode {missing[0][0]}; {len(missing)} of {len(keys)} are "
            "missing); start the run again, it asks unfinished and failed queries"
        )
    return found


def stored_masks(
    folder: Path, key: Key, line: dict[str, Any], truth: np.ndarray
) -> tuple[Packed, Packed, Packed | None]:
    """Masks, truth and input masks of a stored prediction, packed. Raises InputError if they cannot be compared."""
    where = f"{folder}: prediction for {key[1]} (episode {key[0]})"
    try:
        masks = decode_masks(line["masks"])
        small = decode_masks(line["input_masks"]) if "input_masks" in line else None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{where} is no list of COCO RLE of one size; run it again") from None
    if masks.shape != truth.shape or (small is not None and len(small) != len(truth)):
        raise InputError(f"{where} is {masks.shape} (T,H,W), the truth {truth.shape}; run it again on this dataset")
    return Packed.of(masks), Packed.of(truth), None if small is None else Packed.of(small)
