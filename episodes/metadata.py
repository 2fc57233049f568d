"""From the two annotation files of a dataset to `Video` records, whatever the order and the gaps of their keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fewref.episodes.errors import InputError
from fewref.episodes.types import Expression

UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class Video:
    """What the metadata say of a video.

    frames: names, sorted. objects: id -> category, in numeric order of the ids (of a MeViS mask file the id is the
    anno_id). expressions: in numeric order of their ids; texts normalised. object_frames: id -> sorted frames in which
    the object is annotated, only for objects of which the metadata list them. listed_frames, listed_expressions: frame
    names and expression ids in the order of the file, which upstream's protocol and MeViS masks depend on.
    """

    name: str
    frames: tuple[str, ...]
    objects: dict[str, str]
    expressions: tuple[Expression, ...]
    object_frames: dict[str, tuple[str, ...]] = field(default_factory=dict)
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

    Only videos of `meta` count: the sentences' file may be that of the whole parent dataset. A video without
    expressions, frames or known objects is left out with a warning, and so is a useless expression.
    Raises InputError where a file does not have the schema.
    """
    known, spoken = _videos(meta, meta_file), _videos(expressions, file)
    videos, warnings = {}, []
    for name in sorted(known):
        if name not in spoken:
            warnings.append(f"{file}: video {name} of {meta_file.name} is missing here; skipped")
            continue
        record, entries = spoken[name], _table(known[name], "objects", meta_file, name)
        objects, object_frames = {}, {}
        for key in sorted(entries, key=numeric):
            entry = entries[key]
            if not isinstance(entry, dict) or not isinstance(entry.get("category"), str) or not entry["category"]:
                warnings.append(f"{meta_file}: video {name}: object {key} has no category; skipped")
                continue
            objects[key] = entry["category"]
            if isinstance(entry.get("frames"), list):
                object_frames[key] = tuple(sorted(set(map(str, entry["frames"]))))
        frames = record.get("frames") or sorted({frame for seen in object_frames.values() for frame in seen})
        kept = []
        for key, entry in _table(record, "expressions", file, name).items():
            wanted = _list(_field(entry, "obj_id", file, name, key))
            kept.append(_expression(key, entry, wanted, objects, f"{file}: video {name}: expression {key}", warnings))
        _add(videos, Video(name, (), objects, (), object_frames), frames, kept, file, warnings)
    return videos, warnings


def parse_mevis(expressions: object, categories: object, file: Path) -> tuple[dict[str, Video], list[str]]:
    """Videos of MeViS's own schema (lists of obj_id and anno_id; no categories), sorted, and warnings.

    categories: {video: {obj_id: category}}, or {} where every object is of the category "unlabelled". An expression
    without any object has an all-empty truth; its category is that of the video's objects where they agree.
    Raises InputError where the file does not have the schema.
    """
    spoken, labels = _videos(expressions, file), categories if isinstance(categories, dict) else {}
    videos, warnings = {}, []
    for name in sorted(spoken):
        record, objects, wanted = spoken[name], {}, {}
        table = _table(record, "expressions", file, name)
        for key, entry in table.items():
            tracks = wanted[key] = _list(_field(entry, "anno_id", file, name, key))
            for track, number in zip(tracks or [], _list(entry.get("obj_id")) or tracks or [], strict=False):
                objects[track] = str(labels.get(name, {}).get(number, UNLABELLED))
                if labels and objects[track] == UNLABELLED:
                    warnings.append(f"{file}: video {name}: object {number} is not in categories.json; unlabelled")
        objects = {key: objects[key] for key in sorted(objects, key=numeric)}
        kept = [
            _expression(key, entry, wanted[key], objects, f"{file}: video {name}: expression {key}", warnings)
            for key, entry in table.items()
        ]
        _add(videos, Video(name, (), objects, ()), record.get("frames"), kept, file, warnings)
    return videos, list(dict.fromkeys(warnings))


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
    listed = [str(frame) for frame in frames] if isinstance(frames, list) else []
    kept = [expression for expression in kept if expression]
    if not listed:
        warnings.append(f"{file}: video {video.name} has no frames; skipped")
    elif not kept:
        warnings.append(f"{file}: video {video.name} has no expressions; skipped")
    else:
        videos[video.name] = Video(
            name=video.name,
            frames=tuple(sorted(set(listed))),
            objects=video.objects,
            expressions=tuple(sorted(kept, key=lambda expression: numeric(expression.id))),
            object_frames=video.object_frames,
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


def _list(value: object) -> list[str] | None:
    """Ids as strings from one id or a list of them; None where there is none."""
    if value is None:
        return None
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
