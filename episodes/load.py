"""Episodes get their pixels: decode the frames and masks that a shot or query names, one item ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from fewref.episodes.errors import InputError
from fewref.episodes.readers import DatasetIndex, frame_path, image_size, mask_path, read_frames, read_masks
from fewref.episodes.types import Clip, Expression, Query, Shot, SupportSet, Target

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def load_clip(index: DatasetIndex, clip: Clip) -> np.ndarray:
    """Frames of a clip in its order, repeats included: uint8 (T,3,H,W) RGB, contiguous, own memory.

    Raises InputError naming the file for a missing or truncated frame, and for a clip of another dataset.
    """
    if clip.dataset != index.dataset:
        raise InputError(f"{index.root}: was read as {index.dataset}, but the clip {clip.video} is of {clip.dataset}")
    frames = read_frames(index, clip.video, clip.frames)
    return np.array(frames.transpose(0, 3, 1, 2), order="C")


def load_shot(index: DatasetIndex, shot: Shot) -> Shot:
    """The shot with frames uint8 (T,3,H,W) and masks bool (T,H,W), the union of its expression's objects.

    Raises InputError naming the file for unreadable files and for masks of another size than their frames.
    """
    frames = load_clip(index, shot.clip)
    return replace(shot, frames=frames, masks=_masks(index, shot.clip, shot.expression, frames.shape[2:]))


def load_support(index: DatasetIndex, support: SupportSet) -> SupportSet:
    """The support set with the pixels of every shot. Raises InputError as `load_shot`."""
    return replace(support, shots=tuple(load_shot(index, shot) for shot in support.shots))


def load_query(index: DatasetIndex, query: Query) -> Query:
    """The query with frames uint8 (T,3,H,W); opens no mask. Raises InputError naming the file."""
    return replace(query, frames=load_clip(index, query.clip))


def load_queries(index: DatasetIndex, queries: Sequence[Query]) -> tuple[Query, ...]:
    """Queries about one clip, with its frames, which they share. Raises InputError as `load_query`."""
    frames = load_clip(index, queries[0].clip)
    return tuple(replace(query, frames=frames) for query in queries)


def load_truth(index: DatasetIndex, query: Query, target: Target) -> np.ndarray:
    """What only the scorer sees: bool (T,H,W), union of the target's objects, all empty for a no-target expression.

    Raises InputError naming the file, if the masks are not of the image's size, the target belongs to another query or
    the video has no such object.
    """
    return load_truths(index, [query], [target])[0]


def load_truths(index: DatasetIndex, queries: Sequence[Query], targets: Sequence[Target]) -> tuple[np.ndarray, ...]:
    """`load_truth` of queries about one clip; where they mean the same objects, it is one array."""
    clip, found = queries[0].clip, {}
    size = image_size(frame_path(index, clip.video, clip.frames[0]))
    for query, target in zip(queries, targets, strict=True):
        if target.query != query.id:
            other = f"the target of query {target.query} was given for query {query.id}"
            raise InputError(f"{other}; build the manifest again")
        objects = target.expression.objects
        if objects not in found:
            found[objects] = _masks(index, clip, target.expression, size)
    return tuple(found[target.expression.objects] for target in targets)


def prefetch(items: Iterable[Item], load: Callable[[Item], Loaded], workers: int = 1) -> Iterator[Loaded]:
    """`load(item)` of every item, in order, while `workers` threads decode as many items ahead.

    An exception of `load` is raised when its item's turn comes. Closing the generator drops what was not begun.
    """
    pending: deque = deque()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(load, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _masks(index: DatasetIndex, clip: Clip, expression: Expression, size: tuple[int, ...]) -> np.ndarray:
    masks = read_masks(index, clip.video, clip.frames, expression.objects)
    if masks.shape[1:] != tuple(size):
        where = mask_path(index, clip.video, clip.frames[0])
        raise InputError(f"{where}: mask is {masks.shape[1:]}, the image {tuple(size)}; fetch the video again")
    return masks
