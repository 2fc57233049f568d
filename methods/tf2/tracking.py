"""From the mask of a key frame to all others, frame by frame in both directions (TF2 specification, sections 4 and 5).

The network is not in here: a tracker answers for one frame, given the image of another with everything but the object
black.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fewref.episodes.errors import InputError, near
from fewref.methods.tf2.pairing import keep_object

# released: the key frame's two neighbours have masks of their own, which no other frame is tracked from.
# full: every frame but the key frame is tracked from its neighbour on the side of the key frame.
MODES = ("released", "full")
Tracker = Callable[[int, int, np.ndarray], np.ndarray]


def key_frame(scores: Sequence[float]) -> int:
    """Index of the frame with the highest score, the earliest of equals."""
    return int(np.argmax(scores))


def given_frames(frames: int, key: int, mode: str) -> list[int]:
    """Which frames need a mask before tracking from `key` starts, in order. Raises InputError for an unknown mode."""
    _check(mode)
    reach = 1 if mode == "released" else 0
    return list(range(max(0, key - reach), min(frames, key + reach + 1)))


def schedule(frames: int, key: int, mode: str) -> list[tuple[int, int]]:
    """Pairs (frame, frame it is tracked from) in the order of their turn: from the key frame on, then back from it.

    Raises InputError for an unknown mode, ValueError for a key frame outside the clip.
    """
    if not 0 <= key < frames:
        raise ValueError(f"key frame {key} is outside a clip of {frames} frames")
    given, pairs = given_frames(frames, key, mode), []
    for side in (range(key + 1, frames), range(key - 1, -1, -1)):
        last = key
        for frame in side:
            if frame not in given:
                pairs.append((frame, last))
                last = frame
    return pairs


def track(frames: np.ndarray, masks: np.ndarray, key: int, tracker: Tracker, mode: str = "full") -> np.ndarray:
    """Masks bool (T,H,W) of all frames, from those of the frames that `given_frames` names.

    frames: uint8 (T,3,H,W); masks: bool (T,H,W), of which only the given frames are read; tracker: called with the
    index of a frame, of the one it is tracked from, and the tracking image uint8 (3,H,W); returns bool (H,W).
    An empty mask shows the tracker a black image, in that direction until it finds the object again by the sentence.
    Raises as `schedule` does.
    """
    found = np.zeros_like(masks, dtype=bool)
    given = given_frames(len(frames), key, mode)
    found[given] = masks[given]
    for frame, last in schedule(len(frames), key, mode):
        found[frame] = tracker(frame, last, keep_object(frames[last], found[last]))
    return found


def _check(mode: str) -> None:
    if mode not in MODES:
        raise InputError(f"tracking mode {mode!r} is unknown; {near(mode, MODES)}")
