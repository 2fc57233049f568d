"""The run folder: a header, one row per finished query, and the predictions as COCO RLE.

A run that is split has one set of the three files per shard (`rows-0of2.jsonl`, ...); `read_rows` joins them. Lines are
appended and synced before the next query begins; what a kill left half-written is cut off at the next start.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pycocotools import mask as coco

from fewref.episodes.errors import InputError, read_json, write_atomic
from fewref.episodes.manifest import Manifest, read_manifest, write_manifest
from fewref.episodes.types import canonical_json

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one folder go unnoticed
    fcntl = None

Key = tuple[str, str]
COSTS = ("seconds_adapt", "seconds_predict", "peak_bytes")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Row:
    """What is known of one finished query; all fields but `COSTS` are equal for every repetition of the run.

    run: id of the run (header); seed: index of the support draw; status: "ok" or "failed", error: one line.
    scores: scoring protocol -> {"j", "f": one number in [0,1] per frame, "size": [H,W] scored at, "radius" of F,
    "resized", "inter", "union": see `QueryScore`}; empty if failed. frames: of the query. window: frames seen at
    once, smaller than the run's after out-of-memory. seconds_adapt: of the episode's `adapt`, the same in all its rows;
    both seconds without decoding and scoring. seconds_predict: where queries about one clip were asked together, their
    time divided by their number. Where a strategy adapts to the query itself, its time counts as seconds_adapt of that
    row. peak_bytes: see the header's `peak_memory`. adapt_steps, adapt_trained: gradient steps of the adaptation that
    the answer is from, and how many weights they changed.
    """

    run: str
    episode: str
    group: str
    category: str
    seed: int
    query: str
    video: str
    method: str
    status: str
    error: str
    frames: int
    window: int
    confidence: float
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds_adapt: float = 0.0
    seconds_predict: float = 0.0
    peak_bytes: int = 0
    adapt_steps: int = 0
    adapt_trained: int = 0

    @property
    def key(self) -> Key:
        """(episode id, query id), unique in a manifest."""
        return self.episode, self.query

    def means(self, scoring: str) -> tuple[float, float]:
        """(J, F) of the query under a scoring protocol: means over its frames."""
        entry = self.scores[scoring]
        return float(np.mean(entry["j"])), float(np.mean(entry["f"]))


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Bool (T,H,W) -> T COCO RLE objects with `counts` as ASCII text."""
    entries = coco.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": list(entry["size"]), "counts": entry["counts"].decode("ascii")} for entry in entries]


def decode_masks(entries: Sequence[dict[str, Any]]) -> np.ndarray:
    """The inverse of `encode_masks`. Raises ValueError or KeyError for what is no RLE of equal sizes."""
    rles = [{"size": entry["size"], "counts": entry["counts"].encode("ascii")} for entry in entries]
    return np.ascontiguousarray(coco.decode(rles).transpose(2, 0, 1)).astype(bool)


def file_name(kind: str, shard: tuple[int, int]) -> str:
    """Name of a shard's file: `rows.jsonl` of a run in one piece, `rows-0of2.jsonl` of the first of two."""
    piece = "" if shard[1] == 1 else f"-{shard[0]}of{shard[1]}"
    return f"{kind}{piece}.{'json' if kind == 'header' else 'jsonl'}"


def shards_in(folder: Path) -> list[tuple[int, int]]:
    """The (index, count) of every shard that has a header in the folder, sorted."""
    found = (re.fullmatch(r"header(?:-(\d+)of(\d+))?\.json", path.name) for path in Path(folder).glob("header*.json"))
    return sorted((int(match[1] or 0), int(match[2] or 1)) for match in found if match)


class RunFolder:
    """The one writer of a shard's files; a context manager. `rows` holds what is finished, by key.

    Opening makes the folder or takes up the run in it: torn last lines are cut off, rows that failed or lack their
    prediction are dropped (they are asked again), predictions without a row too.
    Raises InputError for a folder that cannot be written, is in use, or holds another run or another split.
    """

    def __init__(
        self, folder: Path, header: dict, manifest: Manifest, order: Sequence[Key], shard: tuple[int, int] = (0, 1)
    ) -> None:
        self.folder, self.order = Path(folder), tuple(order)
        self.rows_path = self.folder / file_name("rows", shard)
        self.predictions_path = self.folder / file_name("predictions", shard)
        header_path = self.folder / file_name("header", shard)
        self._files: list[BinaryIO] = []
        self._check_shards(shard)
        self._lock = self._take_lock(self.folder / f".{header_path.stem}.lock")
        try:
            header = merge_header(header_path, header)
            write_manifest(self.folder / MANIFEST, manifest)
            write_atomic(header_path, json.dumps(header, indent=1, ensure_ascii=False) + "\n")
            self.rows = self._take_up()
            self._files = [self._open(self.rows_path), self._open(self.predictions_path)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, row: Row, prediction: dict | None) -> None:
        """Store a finished query: first its prediction (None if it failed), then, once that is on disk, its row."""
        if prediction is not None:
            self._write(self._files[1], self.predictions_path, prediction)
        self._write(self._files[0], self.rows_path, dataclasses.asdict(row))
        self.rows[row.key] = row

    def finish(self) -> list[Row]:
        """All rows in the manifest's order; files in which they came in another order are put into it."""
        rows = [self.rows[key] for key in self.order if key in self.rows]
        if [_key(line) for _, line in _lines(self.rows_path)] != [row.key for row in rows]:
            self._rewrite(self.rows_path, [row.key for row in rows])
            self._rewrite(self.predictions_path, [row.key for row in rows if row.status == "ok"])
        return rows

    def close(self) -> None:
        """Close the files and let go of the folder; what is written stays and can be taken up."""
        for file in self._files:
            file.close()
        self._lock.close()

    def _check_shards(self, shard: tuple[int, int]) -> None:
        counts = {count for _, count in shards_in(self.folder)} - {shard[1]}
        if counts:
            raise InputError(f"{self.folder}: holds a run in {min(counts)} pieces, not {shard[1]}; use another folder")

    def _take_lock(self, path: Path) -> BinaryIO:
        """Lock a file that stays (a run that deleted it would free its name for a second lock)."""
        file = self._open(path)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"{self.folder}: in use by another process; wait or use another folder") from None
        except OSError:
            pass  # a file system without locks
        return file

    def _take_up(self) -> dict[Key, Row]:
        rows = [_row(line, self.rows_path) for _, line in _lines(self.rows_path)]
        predicted = {_key(line) for _, line in _lines(self.predictions_path)}
        known = set(self.order)
        for row in rows:
            if row.key not in known:
                raise InputError(f"{self.rows_path}: row of {row.query} is not of this manifest; use another folder")
        kept = {row.key: row for row in rows if row.status == "ok" and row.key in predicted}
        self._rewrite(self.rows_path, list(kept))
        self._rewrite(self.predictions_path, list(kept))
        return kept

    def _rewrite(self, path: Path, keys: list[Key]) -> None:
        """Bring the file to the lines of these keys in this order, in one step; leave it alone if it is so already."""
        lines = {_key(value): text for text, value in _lines(path)}
        wanted = b"".join(lines[key] for key in keys)
        if not path.exists() or path.read_bytes() != wanted:
            write_atomic(path, wanted)

    def _open(self, path: Path) -> BinaryIO:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another output folder") from None

    def _write(self, file: BinaryIO, path: Path, value: dict) -> None:
        try:
            file.write(canonical_json(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); mend it and start again") from None


def merge_header(path: Path, header: dict) -> dict:
    """The header to write at `path`: new, or, where a run is taken up, the old one with this environment added.

    Raises InputError naming the first field of `defines` in which the two differ.
    """
    if not path.exists():
        return header
    old = read_json(path)
    if not isinstance(old, dict) or not isinstance(old.get("defines"), dict):
        raise InputError(f"{path}: not the header of a run; use another output folder")
    was, now = _flat(old["defines"]), _flat(header["defines"])
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            values = f"{name} = {was.get(name)!r}, not {now.get(name)!r}"
            raise InputError(f"{path}: holds a run with {values}; use another output folder or the same options")
    return {**old, "resumed": [*old.get("resumed", []), header["environment"]]}


def read_header(folder: Path) -> dict:
    """The header of the run in a folder (its first shard). Raises InputError for none, or for several runs."""
    shards = shards_in(folder)
    if not shards:
        raise InputError(f"{folder}: no run folder (it has no header.json); give the folder that `run --out` wrote")
    headers = [read_json(Path(folder) / file_name("header", shard)) for shard in shards]
    for header, shard in zip(headers, shards, strict=True):
        if header.get("run") != headers[0].get("run"):
            first, this = file_name("header", shards[0]), file_name("header", shard)
            raise InputError(f"{folder}/{this}: is of another run than {first}; keep shards of one run together")
    return headers[0]


def read_rows(folder: Path, partial: bool = False) -> list[Row]:
    """The rows of a run, all shards joined, in the order of its manifest; failed ones included.

    partial: give what is there of an unfinished run. Raises InputError for an unfinished one otherwise, for a folder
    without a run and for damaged files.
    """
    header, manifest = read_header(folder), read_manifest(Path(folder) / MANIFEST)
    rows: dict[Key, Row] = {}
    for shard in shards_in(folder):
        path = Path(folder) / file_name("rows", shard)
        for _, value in _lines(path):
            row = _row(value, path)
            if row.run != header["run"]:
                raise InputError(f"{path}: row of {row.query} is of run {row.run}, the header of {header['run']}")
            rows[row.key] = row
    order = [(episode.id, query.id) for episode in manifest.episodes for query in episode.queries]
    missing = [key for key in order if key not in rows]
    if missing and not partial:
        raise InputError(
            f"{folder}: unfinished, {len(missing)} of {len(order)} queries are missing (first: {missing[0][1]} of "
            f"episode {missing[0][0]}); start the same command again, with every --shard"
        )
    if extra := sorted(rows.keys() - set(order)):
        raise InputError(f"{folder}: row of {extra[0][1]} (episode {extra[0][0]}) is not of its manifest")
    return [rows[key] for key in order if key in rows]


def read_predictions(folder: Path) -> Iterator[tuple[Key, dict]]:
    """The stored predictions of all shards, as (key, line); masks are decoded by `decode_masks`. Raises InputError."""
    for shard in shards_in(folder):
        for _, value in _lines(Path(folder) / file_name("predictions", shard)):
            yield _key(value), value


def _lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    """(bytes, parsed) of every whole line; a torn last line is left out. Raises InputError for damage elsewhere."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
                _key(value)
            except (ValueError, KeyError, TypeError):
                if file.read(1):
                    raise InputError(f"{path}: line {number} is damaged; restore it or run again elsewhere") from None
                return
            if line.endswith(b"\n"):
                yield line, value


def _key(value: dict) -> Key:
    return value["episode"], value["query"]


def _row(value: dict, path: Path) -> Row:
    try:
        return Row(**value)
    except TypeError:
        raise InputError(f"{path}: row of {value['query']} has fields unlike this version's; run it again") from None


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as one, names joined by dots."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
