"""From the two annotation files of a dataset to `Video` records, whatever the order and the gaps of their keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fewref.episodes.errors import InputError
from fewref.episodes.rle import track_frames
from fewref.episodes.types import Expression

UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class Video:
    """What the metadata say of a video.

    frames: names, sorted. objects: id -> category, in numeric order of the ids (of a MeViS mask file the id is the
    anno_id). expressions: in numeric order of their ids; texts normalised. visible: id of every object -> sorted frames
    in which the metadata annotate it (of MeViS: its mask is not empty), all frames where they do not say.
    listed_frames, listed_expressions: frame names and expression ids in the order of the file, on which upstream's
    protocol and MeViS masks depend.
    """

    name: str
    frames: tuple[str, ...]
    objects: dict[str, str]
    expressions: tuple[Expression, ...]
    visible: dict[str, tuple[str, ...]] = field(default_factory=dict)
    listed_frames: tuple[str, ...] = ()
    listed_expressions: tuple[str, ...] = ()


def normalise(text: str) -> str:
    """Lower-case, words joined by single blanks; punctuation stays (hengliusky/Few_shot_RVOS)."""
    return " ".join(text.lower().split())


def numeric(identifier: str) -> tuple[int, int, str]:
    """Sort key for ids: numbers by value, then anything else by its letters."""
    return (0, int(identifier), identifier) if identifier.isdecimal() else (1, 0, identifier)


def parse_youtube(meta: object, expressions: object, meta_file: Path, file: Path) -> tuple[dict[str, Video], list[str]]:
    """Videos of the YouTube, SAIL and DAVIS schema (`meta.json` + `meta_expressions.json`), sorted, and warnings.

    Only videos in both files count: either may be that of several parts or of the whole parent dataset. A video without
    expressions, frames or known objects is left out with a warning, and so is a useless expression.
    Raises InputError where a file does not have the schema.
    """
    known, spoken = _videos(meta, meta_file), _videos(expressions, file)
    videos, warnings = {}, []
    for name in sorted(known.keys() & spoken.keys()):
        record, entries = spoken[name], _table(known[name], "objects", meta_file, name)
        objects, visible = {}, {}
        for key in sorted(entries, key=numeric):
            entry = entries[key]
            if not (key.isdecimal() and 0 < int(key) < 256):
                warnings.append(f"{meta_file}: video {name}: object {key} cannot be a pixel value (1 to 255); skipped")
                continue
            if not isinstance(entry, dict) or not isinstance(entry.get("category"), str) or not entry["category"]:
                warnings.append(f"{meta_file}: video {name}: object {key} has no category; skipped")
                continue
            objects[key] = entry["category"]
            if isinstance(entry.get("frames"), list):
                visible[key] = tuple(sorted(set(map(str, entry["frames"]))))
        frames = record.get("frames") or sorted({frame for seen in visible.values() for frame in seen})
        kept = []
        for key, entry in _table(record, "expressions", file, name).items():
            wanted = _list(_field(entry, "obj_id", file, name, key))
            kept.append(_expression(key, entry, wanted, objects, f"{file}: video {name}: expression {key}", warnings))
        _add(videos, Video(name, (), objects, (), visible), frames, kept, file, warnings)
    return videos, warnings


def silent_videos(metas: dict[Path, dict], spoken: set[str]) -> list[str]:
    """A warning for each video of a `meta.json` that is in no file of expressions; spoken: the videos which are."""
    return [
        f"{file}: video {name} is in no meta_expressions.json; skipped"
        for file, meta in metas.items()
        for name in sorted(meta["videos"].keys() - spoken)
    ]


def parse_mevis(
    expressions: object, categories: dict, tracks: dict[str, list] | None, file: Path
) -> tuple[dict[str, Video], list[str]]:
    """Videos of MeViS's own schema (lists of obj_id and anno_id; no categories), sorted, and warnings.

    categories: {video: {obj_id: category}}, or {} where every object is of the category "unlabelled". tracks: the
    content of `mask_dict.json`, None if it is not at hand. An expression without any object has an all-empty truth; its
    category is that of the video's objects where they agree. Raises InputError where the file has another schema.
    """
    spoken = _videos(expressions, file)
    if not isinstance(categories, dict) or not all(isinstance(labels, dict) for labels in categories.values()):
        raise InputError(f"{file.with_name('categories.json')}: not a table of video -> obj_id -> category")
    videos, warnings = {}, []
    for name in sorted(spoken):
        table = _table(spoken[name], "expressions", file, name)
        wanted = {key: _list(_field(entry, "anno_id", file, name, key)) for key, entry in table.items()}
        objects = _labelled(name, table, wanted, categories, file, warnings)
        listed = _names(spoken[name].get("frames"))
        visible = _tracked(name, objects, listed, tracks, file, warnings)
        objects = {key: objects[key] for key in sorted(visible, key=numeric)}
        kept = [
            _expression(key, entry, wanted[key], objects, f"{file}: video {name}: expression {key}", warnings)
            for key, entry in table.items()
        ]
        _add(videos, Video(name, (), objects, (), visible), listed, kept, file, warnings)
    return videos, warnings


def _labelled(
    name: str, table: dict, wanted: dict, categories: dict, file: Path, warnings: list[str]
) -> dict[str, str]:
    """anno_id -> category of every object that an expression means; obj_id and anno_id lists run in parallel."""
    numbers: dict[str, str] = {}
    for key, entry in table.items():
        tracks = wanted[key] or []
        owners = _list(entry.get("obj_id")) or tracks
        if len(owners) != len(tracks):
            warnings.append(f"{file}: video {name}: expression {key} has {len(owners)} obj_id, {len(tracks)} anno_id")
        numbers.update(zip(tracks, owners, strict=False))
    labels = categories.get(name, {})
    for number in sorted(set(numbers.values()), key=numeric):
        if categories and number not in labels:
            warnings.append(f"{file}: video {name}: object {number} is not in categories.json; taken as {UNLABELLED}")
    return {track: str(labels.get(number, UNLABELLED)) for track, number in numbers.items()}


def _tracked(
    name: str, objects: dict, listed: list[str], tracks: dict | None, file: Path, warnings: list[str]
) -> dict[str, tuple[str, ...]]:
    """anno_id -> frames with a mask, of those objects whose track is in the mask file and sound."""
    if tracks is None:
        return {key: tuple(sorted(set(listed))) for key in objects}
    visible = {}
    for key in objects:
        try:
            if key not in tracks:
                raise ValueError("is missing")
            visible[key] = track_frames(tracks[key], listed)
        except ValueError as error:
            warnings.append(f"{file.with_name('mask_dict.json')}: video {name}: anno_id {key}: {error}; skipped")
    return visible


def _expression(
    key: str, entry: dict, wanted: list[str] | None, objects: dict[str, str], where: str, warnings: list[str]
) -> Expression | None:
    """The expression, or None with a warning. wanted: ids of the objects meant; None where the file does not say."""
    text = entry.get("exp")
    unknown = [number for number in wanted or [] if number not in objects]
    found = sorted({objects[number] for number in wanted or [] if number in objects})
    if not isinstance(text, str) or not text.strip():
        warnings.append(f"{where} is empty; skipped")
    elif wanted is None:
        warnings.append(f"{where} names no object (a part without truth?); skipped")
    elif unknown:
        warnings.append(f"{where} names object {unknown[0]}, which the video does not have; skipped")
    elif len(found) > 1:
        warnings.append(f"{where} names objects of several categories ({', '.join(found)}); skipped")
    else:
        if not found:
            present = sorted(set(objects.values()))
            found = present if len(present) == 1 else [UNLABELLED]
        return Expression(key, normalise(text), tuple(sorted(set(wanted), key=numeric)), found[0])
    return None


def _add(videos: dict, video: Video, frames: object, kept: list, file: Path, warnings: list[str]) -> None:
    listed = _names(frames)
    every = tuple(sorted(set(listed)))
    kept = [expression for expression in kept if expression]
    if not listed:
        warnings.append(f"{file}: video {video.name} has no frames; skipped")
    elif not kept:
        warnings.append(f"{file}: video {video.name} has no expressions; skipped")
    else:
        videos[video.name] = Video(
            name=video.name,
            frames=every,
            objects=video.objects,
            expressions=tuple(sorted(kept, key=lambda expression: numeric(expression.id))),
            visible={key: tuple(f for f in every if f in set(video.visible.get(key, every))) for key in video.objects},
            listed_frames=tuple(listed),
            listed_expressions=tuple(expression.id for expression in kept),
        )


def _videos(data: object, file: Path) -> dict:
    if not isinstance(data, dict) or not isinstance(data.get("videos"), dict):
        raise InputError(f'{file}: not an annotation file (no table "videos"); take the one of the dataset')
    for name, record in data["videos"].items():
        if not isinstance(record, dict):
            raise InputError(f"{file}: video {name}: not a table; take the file of the dataset")
    return data["videos"]


def _table(record: dict, name: str, file: Path, video: str) -> dict:
    value = record.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f'{file}: video {video}: "{name}" is not a table; take the file of the dataset')
    return value


def _field(entry: object, name: str, file: Path, video: str, key: str) -> object:
    if not isinstance(entry, dict):
        raise InputError(f"{file}: video {video}: expression {key} is not a table; take the file of the dataset")
    return entry.get(name)


def _names(frames: object) -> list[str]:
    return [str(frame) for frame in frames] if isinstance(frames, list) else []


def _list(value: object) -> list[str] | None:
    """Ids as strings from one id or a list of them; None where there is none."""
    if value is None:
        return None
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
