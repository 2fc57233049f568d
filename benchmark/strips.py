"""What the picture of several runs shows: per manifest one query, chosen by a rule, its pixels and every answer."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fewref.benchmark.store import MANIFEST, Key, Row, decode_masks, read_header, read_predictions, read_rows
from fewref.episodes.errors import InputError
from fewref.episodes.load import load_query, load_shot, load_truth
from fewref.episodes.manifest import Manifest, check_matches, read_manifest
from fewref.episodes.readers import DatasetIndex
from fewref.episodes.types import Episode, Query, Shot, Target
from fewref.methods.adaptation.options import TRANSDUCTIVE

RULE = (
    "Which query: among those that every run of a strip has finished, the one with the smallest SHA-256 of "
    "“<episode id>/<query id>”. Which frames: evenly spaced. Scores: of this query alone, over all its frames, "
    "in percent, scoring protocol {scoring}."
)


@dataclass(frozen=True)
class Band:
    """A row of frames. frames: uint8 (n,3,H,W); masks: bool (n,H,W); score: "" where the masks are the truth."""

    label: str
    score: str
    notes: tuple[str, ...]
    frames: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class Section:
    """A clip with its sentence and one or more bands. positions: of the n frames shown, from 0; total: of the clip."""

    heading: str
    sentence: str
    positions: tuple[int, ...]
    total: int
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Strip:
    """One episode of one manifest: the support's sections, then that of the query."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


def collect(
    folders: Sequence[Path], indexes: Mapping[str, DatasetIndex], frames: int, scoring: str | None
) -> tuple[list[Strip], str]:
    """The strips, one per manifest, in the order of the folders, and the caption that says how they were chosen.

    Arguments and InputError as `fewref.benchmark.picture.write_picture`.
    """
    if frames < 1:
        raise InputError(f"--frames {frames}: show at least 1 frame")
    headers = {Path(folder): read_header(folder) for folder in folders}
    if not headers:
        raise InputError("the picture needs a run; give the folders that `run --out` wrote")
    scoring = common_scoring(headers, scoring)
    shared: dict[str, dict[Path, dict]] = {}
    for folder, header in headers.items():
        shared.setdefault(header["defines"]["manifest_hash"], {})[folder] = header
    return [load_strip(runs, indexes, frames, scoring) for runs in shared.values()], RULE.format(scoring=scoring)


def common_scoring(headers: Mapping[Path, dict], wanted: str | None) -> str:
    """The scoring protocol wanted, or the first that all runs have. Raises InputError naming a run that lacks it."""
    each = {folder: header["defines"]["scoring"] for folder, header in headers.items()}
    if wanted is None:
        first = next(iter(each.values()))
        wanted = next((name for name in first if all(name in names for names in each.values())), first[0])
    for folder, names in each.items():
        if wanted not in names:
            raise InputError(f"{folder}: was not scored under {wanted!r} (but {', '.join(names)}); score it again")
    return wanted


def choose(finished: Sequence[set[Key]]) -> Key | None:
    """(episode id, query id) of the smallest SHA-256 of "<episode id>/<query id>" among those in all sets, or None.

    The rule knows nothing of masks and scores, so nobody picks what is shown.
    """
    return min(
        set.intersection(*finished), key=lambda key: hashlib.sha256("/".join(key).encode()).digest(), default=None
    )


def load_strip(headers: Mapping[Path, dict], indexes: Mapping[str, DatasetIndex], frames: int, scoring: str) -> Strip:
    """The strip of the runs (folder -> header) of one manifest. Raises InputError as `collect`."""
    manifest = read_manifest(next(iter(headers)) / MANIFEST)
    if manifest.dataset not in indexes:
        known = ", ".join(sorted(indexes)) or "none"
        raise InputError(f"{next(iter(headers))}: is a run on {manifest.dataset}; give its data (given: {known})")
    index = indexes[manifest.dataset]
    check_matches(manifest, index)
    rows = [{row.key: row for row in read_rows(folder, partial=True) if row.status == "ok"} for folder in headers]
    key = choose([set(found) for found in rows])
    if key is None:
        names = ", ".join(map(str, headers))
        raise InputError(f"{names}: no query is finished in all of them; finish the runs or leave one out")
    episode, query, target = _find(manifest, key)
    positions = shown(len(query.clip.frames), frames)
    pixels = load_query(index, _cut(query, positions)).frames
    truth = load_truth(index, _cut(query, positions), target)
    bands = [Band("ground truth", "", (), pixels, truth)]
    labels = _labels(list(headers.values()))
    for folder, (label, notes), found in zip(headers, labels, rows, strict=True):
        masks = _stored(folder, key, (len(query.clip.frames), *truth.shape[1:]))
        score, parts = _scores(found[key], scoring)
        notes = (parts, *notes, *([] if masks.any() else ["no mask in any frame"]))
        bands.append(Band(label, score, notes, pixels, masks[positions]))
    group = manifest.dataset if manifest.group == "all" else f"Group {manifest.group}"
    asked = Section("Query", query.text, tuple(positions), len(query.clip.frames), tuple(bands))
    subtitle = f"{manifest.dataset}, episode {episode.id}, draw {episode.seed}, query {query.id}"
    return Strip(f"{group}: {episode.category}", subtitle, (*_support(index, episode, frames), asked))


def shown(total: int, wanted: int) -> list[int]:
    """At most `wanted` positions out of range(total), evenly spaced with both ends."""
    return np.linspace(0, total - 1, min(wanted, total)).round().astype(int).tolist()


def _support(index: DatasetIndex, episode: Episode, frames: int) -> Iterator[Section]:
    shots = episode.support.shots
    for number, shot in enumerate(shots, 1):
        total = len(shot.clip.frames)
        positions = shown(total, frames)
        loaded = load_shot(index, _cut(shot, positions))
        heading = "Support" if len(shots) == 1 else f"Support {number}/{len(shots)}"
        band = Band("support masks", "", (f"video {shot.clip.video}",), loaded.frames, loaded.masks)
        yield Section(heading, shot.expression.text, tuple(positions), total, (band,))


def _cut(item: Shot | Query, positions: Sequence[int]) -> Shot | Query:
    return replace(item, clip=replace(item.clip, frames=tuple(item.clip.frames[place] for place in positions)))


def _find(manifest: Manifest, key: Key) -> tuple[Episode, Query, Target]:
    episode = next(episode for episode in manifest.episodes if episode.id == key[0])
    place = [query.id for query in episode.queries].index(key[1])
    return episode, episode.queries[place], episode.targets[place]


def _stored(folder: Path, key: Key, shape: tuple[int, ...]) -> np.ndarray:
    line = next((line for found, line in read_predictions(folder) if found == key), None)
    where = f"{folder}: prediction for {key[1]} (episode {key[0]})"
    if line is None:
        raise InputError(f"{where} is not there; give the folder of the run itself, not that of its later scores")
    try:
        masks = decode_masks(line["masks"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{where} is no list of COCO RLE of one size; run it again") from None
    if masks.shape != shape:
        raise InputError(f"{where} is {masks.shape} (T,H,W), the query {shape}; run it again on this dataset")
    return masks


def _scores(row: Row, scoring: str) -> tuple[str, str]:
    j, f = (100 * value for value in row.means(scoring))
    return f"J&F {(j + f) / 2:.1f}", f"J {j:.1f}, F {f:.1f}"


def _labels(headers: Sequence[dict]) -> list[tuple[str, tuple[str, ...]]]:
    """Per run the method's name with its adaptation, and what else tells it from the others."""
    labels = []
    for header in headers:
        defines = header["defines"]
        notes = [f"{name}: {defines[name]}" for name in ("text", "support") if defines[name] != "right"]
        notes += ["sees the truth"] if defines["sees_truth"] else []
        notes += ["untrained"] if defines["checkpoint_sha256"] == "untrained" else []
        strategy = (defines.get("adaptation") or {}).get("strategy", "none")
        notes += ["transductive"] if strategy in TRANSDUCTIVE else []
        labels.append((defines["method"] + (f" + {strategy}" if strategy != "none" else ""), tuple(notes)))
    twice = Counter(labels)
    return [
        (label[0], (*label[1], f"run {header['run']}") if twice[label] > 1 else label[1])
        for label, header in zip(labels, headers, strict=True)
    ]
