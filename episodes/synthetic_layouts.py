"""One synthetic video on disk, in each dataset's own layout and with the odd habits of the real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from fewref.episodes.errors import InputError
from fewref.episodes.synthetic_scene import COLOURS, Cast, Scene, generator, paint, plan_scene
from fewref.episodes.synthetic_text import describe, say

ANY = {"colour": 0.66, "place": 0.15, "motion": 0.12, "relation": 0.07}
FIRST_FRAME = {"colour": 0.6, "place": 0.3, "relation": 0.1}
FULL_VIDEO = {"motion": 0.6, "colour": 0.4}
MOVING = {"motion": 0.6, "colour": 0.25, "place": 0.15}
Sentence = tuple[str, tuple[int, ...]]  # text, indices of the objects meant


@dataclass(frozen=True)
class Job:
    """One video to write under `folder`; index: its position in the dataset; key: what its generator is keyed by."""

    folder: Path
    layout: str
    name: str
    key: str
    index: int
    cast: Cast
    frames: int
    size: tuple[int, int]


def write_video(job: Job) -> dict:
    """Write a video's images and masks; returns the entry of each metadata file: {file: value}."""
    rng = generator(job.key)
    for _ in range(500):
        scene = plan_scene(rng, job.cast, job.frames, job.size)
        sentences = _SENTENCES[job.layout](rng, job, scene)
        if sentences is not None:
            break
    else:
        raise InputError(f"video {job.name}: no sentences tell its objects apart; give more frames or larger ones")
    frames = tuple(f"{5 * t:05d}" for t in range(job.frames))
    pixels = paint(rng, scene, blocky=job.layout == "sail")
    images = {"youtube": "train/JPEGImages", "sail": "Images"}.get(job.layout, "JPEGImages")
    folder = job.folder / images / job.name
    folder.mkdir(parents=True)
    for frame, image in zip(frames, pixels, strict=True):
        if job.layout == "sail":
            Image.fromarray(image).save(folder / f"{frame}.bmp")
        else:
            Image.fromarray(image).save(folder / f"{frame}.jpg", quality=92, subsampling=0)
    return _RECORDS[job.layout](rng, job, scene, frames, sentences)


def write_metadata(folder: Path, jobs: list[Job], records: list[dict]) -> None:
    """Write a dataset's JSON files from what `write_video` returned, videos in the order of `jobs`."""
    for file in records[0]:
        entries = {job.name: record[file] for job, record in zip(jobs, records, strict=True)}
        if file == "mask_dict.json":
            content = {key: value for entry in entries.values() for key, value in entry.items()}
        else:
            content = entries if file == "categories.json" else {"videos": entries}
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _youtube_sentences(rng: np.random.Generator, job: Job, scene: Scene) -> list[Sentence] | None:
    """One or two sentences for each object of the video's category, in a third of the videos one for a distractor."""
    used: set[str] = set()
    result = []
    for n, thing in enumerate(scene.things):
        primary = thing.category == job.cast.category[0]
        wanted = 1 + (rng.random() < 0.5) if primary else 0
        if thing.category == job.cast.others[0][0] and rng.random() < 1 / 3:
            wanted = 1
        texts = [describe(rng, scene, (n,), ANY, used) for _ in range(wanted)]
        if primary and texts[0] is None:
            return None
        result += [(text, (n,)) for text in texts if text]
    if job.index % 40 == 5:  # a sign beyond ASCII, as in real sentences
        result = [(_dashed(text, scene.things[meant[0]].colour), meant) for text, meant in result]
    return [result[k] for k in rng.permutation(len(result))]


def _dashed(text: str, colour: str) -> str:
    return text if colour in text else f"{text} – the {colour} one"


def _sail_sentences(rng: np.random.Generator, job: Job, scene: Scene) -> list[Sentence] | None:
    target = next(n for n, thing in enumerate(scene.things) if thing.category == job.cast.category[0])
    text = describe(rng, scene, (target,), ANY, set())
    return text and [(text, (target,))]


def _davis_sentences(rng: np.random.Generator, job: Job, scene: Scene) -> list[Sentence] | None:
    """Per object four sentences, of two annotators: what the first frame shows, then what the whole video shows."""
    used: set[str] = set()
    weights = (FIRST_FRAME, FULL_VIDEO) * 2
    result = [(describe(rng, scene, (n,), w, used), (n,)) for n in range(len(scene.things)) for w in weights]
    return result if all(text for text, _ in result) else None


def _mevis_sentences(rng: np.random.Generator, job: Job, scene: Scene) -> list[Sentence] | None:
    """Two sentences about several objects, two about single ones, and in some videos one that means nothing there."""
    used: set[str] = set()
    same = [n for n, thing in enumerate(scene.things) if thing.category == job.cast.category[0]]
    several = [(a, b) for i, a in enumerate(same) for b in same[i + 1 :]] + [tuple(same)]
    result: list[Sentence] = []
    for sets in (several, [(n,) for n in same]):
        told = ((describe(rng, scene, sets[k], MOVING, used), sets[k]) for k in rng.permutation(len(sets)))
        result += [(text, meant) for text, meant in told if text][:2]
    if len(result) < 3 or len(result[0][1]) < 2:
        return None
    if job.index % 8 == 3:
        seen = {scene.things[n].colour for n in same}
        absent = [colour for colour in COLOURS if colour not in seen]
        facts = {"colour": absent[int(rng.integers(len(absent)))]}
        result.append((say(rng, job.cast.category[0], facts, 1, []), ()))
    return result


def _youtube_record(rng, job: Job, scene: Scene, frames: tuple, sentences: list[Sentence]) -> dict:
    """Ids of objects and expressions have gaps in some videos, a few frame lists are out of order."""
    count = len(scene.things)
    spread = (1, 3, 4, 6) if job.index % 9 == 4 else (1, 2, 3, 4)
    ids = [spread[k] for k in rng.permutation(count)]
    _write_masks(job.folder / "train/Annotations" / job.name, frames, _label(scene, ids))
    step = 3 if job.index % 11 == 6 else 1
    expressions = {
        str(step * k): {"exp": text, "obj_id": str(ids[meant[0]])} for k, (text, meant) in enumerate(sentences)
    }
    listed = frames[3:] + frames[:3] if job.index % 13 == 5 else frames
    return {
        "train/meta.json": {"objects": _objects(scene, ids, frames)},
        "meta_expressions/train/meta_expressions.json": {"expressions": expressions, "frames": list(listed)},
    }


def _sail_record(rng, job: Job, scene: Scene, frames: tuple, sentences: list[Sentence]) -> dict:
    """The one labelled object is number 1; a third of the videos stores it as 255."""
    text, (target,) = sentences[0]
    value = 255 if job.index % 3 == 1 else 1
    _write_masks(job.folder / "Annotations" / job.name, frames, scene.visible[target].astype(np.uint8) * value)
    ids = [1 if n == target else 0 for n in range(len(scene.things))]
    return {
        "meta.json": {"objects": _objects(scene, ids, frames)},
        "meta_expressions.json": {"expressions": {"0": {"exp": text, "obj_id": "1"}}, "frames": list(frames)},
    }


def _davis_record(rng, job: Job, scene: Scene, frames: tuple, sentences: list[Sentence]) -> dict:
    ids = list(range(1, len(scene.things) + 1))
    _write_masks(job.folder / "Annotations" / job.name, frames, _label(scene, ids))
    expressions = {str(k): {"exp": text, "obj_id": str(ids[n])} for k, (text, (n,)) in enumerate(sentences)}
    return {
        "meta.json": {"objects": _objects(scene, ids, frames)},
        "meta_expressions.json": {"expressions": expressions, "frames": list(frames)},
    }


def _mevis_record(rng, job: Job, scene: Scene, frames: tuple, sentences: list[Sentence]) -> dict:
    annotation = [10 * job.index + n for n in range(len(scene.things))]
    expressions = {
        str(k): {"exp": text, "obj_id": list(meant), "anno_id": [annotation[n] for n in meant]}
        for k, (text, meant) in enumerate(sentences)
    }
    return {
        "meta_expressions.json": {"vid_id": job.index, "frames": list(frames), "expressions": expressions},
        "mask_dict.json": {str(a): [_rle(m) for m in scene.visible[n]] for n, a in enumerate(annotation)},
        "categories.json": {str(n): thing.category for n, thing in enumerate(scene.things)},
    }


def _objects(scene: Scene, ids: list[int], frames: tuple) -> dict:
    """Object id -> category and the frames that show it, in order of id; id 0 means not labelled."""
    seen = scene.visible.any((2, 3))
    return {
        str(number): {
            "category": scene.things[n].category,
            "frames": [frame for frame, shown in zip(frames, seen[n], strict=True) if shown],
        }
        for number, n in sorted((number, n) for n, number in enumerate(ids) if number)
    }


def _label(scene: Scene, ids: list[int]) -> np.ndarray:
    """uint8 (T,H,W): the id of the object seen at each pixel, 0 for the background."""
    return (scene.visible * np.array(ids, np.uint8)[:, None, None, None]).sum(0, dtype=np.uint8)


def _write_masks(folder: Path, frames: tuple[str, ...], labels: np.ndarray) -> None:
    """Palette PNGs with the customary colours: bit b of an id goes to the high bits of channel b modulo 3."""
    ids = np.arange(256)
    shades = [sum(((ids >> (3 * j + c)) & 1) << (7 - j) for j in range(3)) for c in range(3)]
    palette = np.stack(shades, 1).astype(np.uint8).tobytes()
    folder.mkdir(parents=True)
    for frame, label in zip(frames, labels, strict=True):
        image = Image.fromarray(label)
        image.putpalette(palette)
        image.save(folder / f"{frame}.png", compress_level=6)


def _rle(mask: np.ndarray) -> dict | None:
    if not mask.any():
        return None
    code = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


_SENTENCES: dict[str, Callable] = {
    "youtube": _youtube_sentences,
    "sail": _sail_sentences,
    "davis": _davis_sentences,
    "mevis": _mevis_sentences,
}
_RECORDS: dict[str, Callable] = {
    "youtube": _youtube_record,
    "sail": _sail_record,
    "davis": _davis_record,
    "mevis": _mevis_record,
}
