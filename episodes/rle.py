"""`mask_dict.json`, a table of anno_id -> one COCO RLE or null per frame, in the order of the frame list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from fewref.episodes.errors import InputError, read_json


def read_mask_file(path: Path) -> dict[str, list]:
    """The table of a `mask_dict.json`. Raises InputError naming the file where it is none."""
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(track, list) for track in table.values()):
        raise InputError(f"{path}: not a table of anno_id -> list of RLE; fetch it again")
    return table


def read_rle(value: object) -> dict | None:
    """A COCO RLE (counts as string or as list) in the form pycocotools takes; None for null or an empty mask.

    Raises ValueError for anything else.
    """
    if value is None:
        return None
    try:
        height, width = map(int, value["size"])
        if isinstance(value["counts"], list):
            rle = coco.frPyObjects(value, height, width)
        else:
            rle = {"size": [height, width], "counts": value["counts"].encode("ascii")}
        return rle if coco.area(rle) > 0 else None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError("not a COCO RLE") from None


def union(rles: list[dict]) -> np.ndarray:
    """The logical or of at least one RLE of one size: bool (H,W)."""
    return coco.decode(coco.merge(rles)).astype(bool)


def track_frames(track: list, frames: list[str]) -> tuple[str, ...]:
    """Sorted names of the frames in which a track has a non-empty mask.

    frames: names in the order of the file. Raises ValueError where the lengths differ or an entry is no RLE.
    """
    if len(track) != len(frames):
        raise ValueError(f"{len(track)} entries for {len(frames)} frames")
    return tuple(sorted({frame for frame, value in zip(frames, track, strict=True) if read_rle(value)}))
