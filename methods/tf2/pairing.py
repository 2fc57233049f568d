"""Which frame a training frame is tracked from, and what of it the network is shown (TF2 specification, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def neighbour(index: int, frames: int) -> int:
    """Index of the tracking frame of frame `index` in a video of `frames` frames.

    Even frames look ahead, odd ones and the last one back; the only frame of a video is its own tracking frame.
    """
    if frames == 1:
        return 0
    ahead = index % 2 == 0 and index < frames - 1
    return index + 1 if ahead else index - 1


def neighbours(indices: Sequence[int], frames: int) -> list[int]:
    """The tracking frame of each of several frames of one video; see `neighbour`."""
    return [neighbour(index, frames) for index in indices]


def keep_object(frames: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Tracking images: frames uint8 (...,3,H,W) black outside masks bool (...,H,W), all black without an object."""
    return frames * masks[..., None, :, :].astype(np.uint8)
