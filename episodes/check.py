"""Read a whole dataset folder and list every fault, one line each, naming the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from fewref.episodes.errors import InputError, near
from fewref.episodes.metadata import Video
from fewref.episodes.readers import (
    DatasetIndex,
    decode_frame,
    decode_labels,
    frame_path,
    mask_path,
    read_index,
    stands_for_one,
    track_rle,
)
from fewref.splits import Split, load_split

Result = TypeVar("Result")


def check_dataset(dataset: str, root: Path, fast: bool = False, progress: bool = True) -> list[str]:
    """Every fault of the dataset at `root`, in the order of its videos; an empty list for a sound one.

    fast: structure only (metadata, and which files exist); otherwise every image and mask is decoded. progress: show a
    bar. Raises InputError for an unknown dataset; a folder that cannot be read at all is itself the one fault.
    """
    split = load_split(dataset)
    try:
        index = read_index(dataset, root)
    except InputError as error:
        return [str(error)]
    faults = [*index.warnings, *_against_published(index, split), *_missing_folders(index)]
    for name in tqdm(index.videos, desc=f"checking {dataset}", unit="video", disable=not progress):
        video, tree = index.videos[name], index.trees[name]
        faults += _category_faults(index, split, video)
        if tree.images.is_dir() and (tree.mask_file or tree.masks.is_dir()):
            faults += _file_faults(index, video) if fast else _pixel_faults(index, video)
    return list(dict.fromkeys(faults))


def _against_published(index: DatasetIndex, split: Split) -> Iterator[str]:
    found = {"videos": len(index.videos), "categories": len(index.categories())}
    for what, wanted in split.counts.items():
        if found[what] != wanted:
            yield f"{index.root}: {found[what]} {what} where {wanted} are published; the copy is not complete"


def _missing_folders(index: DatasetIndex) -> Iterator[str]:
    for tree in dict.fromkeys(index.trees.values()):
        for folder in [tree.images] if tree.mask_file else [tree.images, tree.masks]:
            if not folder.is_dir():
                yield f"{folder}: no such folder; fetch the part of the dataset that holds it"


def _category_faults(index: DatasetIndex, split: Split, video: Video) -> Iterator[str]:
    file = index.trees[video.name].meta
    for number, category in video.objects.items():
        if split.categories and category not in split.categories:
            hint = near(category, split.categories)
            yield f"{file}: video {video.name}: object {number}: unknown category {category!r}: {hint}"


def _file_faults(index: DatasetIndex, video: Video) -> Iterator[str]:
    """Missing and empty files. A mask may be missing only where the metadata say that the frame shows no object."""
    shown = {frame for frames in video.visible.values() for frame in frames}
    for frame in video.frames:
        path = frame_path(index, video.name, frame)
        if not path.is_file():
            yield f"{path}: no such image; fetch it again"
        elif not path.stat().st_size:
            yield f"{path}: empty file; fetch it again"
        path = mask_path(index, video.name, frame)
        if not path.is_file() and frame in shown:
            yield f"{path}: no mask, though the metadata say that this frame shows an object"
        elif path.is_file() and not path.stat().st_size:
            yield f"{path}: empty file; fetch it again"


def _pixel_faults(index: DatasetIndex, video: Video) -> Iterator[str]:
    """Decode every frame and mask of a video: unreadable files, sizes, ids; then objects that no mask shows."""
    yield from _file_faults(index, video)
    size, seen, whole = None, set(), True
    for frame in video.frames:
        path = frame_path(index, video.name, frame)
        faults: list[str] = []
        own = None
        if path.is_file() and path.stat().st_size:
            own = _try(faults, lambda path=path: decode_frame(path).shape[:2])
            size = size or own
            if own and own != size:
                faults.append(f"{path}: {_by(own)}, the frames before it {_by(size)}; fetch the video again")
        whole &= _mask_faults(index, video, frame, own, seen, faults)
        yield from faults
    for number in video.objects:
        if whole and number not in seen:
            where = mask_path(index, video.name, video.frames[0])
            where = where if index.trees[video.name].mask_file else where.parent
            yield f"{where}: video {video.name}: object {number} ({video.objects[number]}) has no pixel in any frame"


def _mask_faults(
    index: DatasetIndex, video: Video, frame: str, size: tuple[int, int] | None, seen: set[str], faults: list[str]
) -> bool:
    """Judge one frame's mask; adds the ids it shows to `seen`. False where it cannot be read."""
    path = mask_path(index, video.name, frame)
    if index.trees[video.name].mask_file:
        rles = {number: track_rle(index, video.name, frame, number) for number in video.objects}
        sizes = {number: tuple(rle["size"]) for number, rle in rles.items() if rle}
        seen |= set(sizes)
        for number, own in sizes.items():
            if size and own != size:
                faults.append(f"{path}: anno_id {number}, frame {frame}: {_by(own)}, the image is {_by(size)}")
        return True
    if not path.is_file() or not path.stat().st_size:
        return not path.exists()
    labels = _try(faults, lambda: decode_labels(path))
    if labels is None:
        return False
    if size and labels.shape != size:
        faults.append(f"{path}: mask is {_by(labels.shape)}, the image {_by(size)}; fetch the video again")
    values = {str(value) for value in np.unique(labels) if value}
    if index.layout == "sail" and stands_for_one(labels, video):
        values = set(video.objects) if values else set()
    for value in sorted(values - set(video.objects), key=int):
        meta = index.trees[video.name].meta.name
        faults.append(f"{path}: pixels of object {value}, which {meta} does not have for video {video.name}")
    seen |= values
    return True


def _try(faults: list[str], read: Callable[[], Result]) -> Result | None:
    try:
        return read()
    except InputError as error:
        faults.append(str(error))
        return None


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"
