"""Training clips: boxes and validity from masks, and the augmentation of frames, masks, boxes and sentence together.

NumPy and PIL only. Random choices come from the generator handed in; one set of draws serves a whole clip, apart from
the photometric distortion, which is drawn per frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from fewref.episodes.errors import InputError, near
from fewref.episodes.photometric import distort

SHORT_SIDES = (288, 320, 352, 392, 416, 448, 480, 512)
LONGEST = 640
FIRST_SIDES = (400, 500, 600)
CROP_LOW, CROP_HIGH = 384, 600
TINY_ZOOM = 0.9  # smallest share of each side that the tiny augmentation keeps


@dataclass(frozen=True)
class ClipSample:
    """A clip on its way into training.

    frames: uint8 (T,H,W,3) RGB; masks: bool (T,H,W); boxes: float32 (T,4) x1, y1, x2, y2 in pixels, zero where there is
    no object; valid: int64 (T,) 0/1; text: the sentence.
    """

    frames: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    valid: np.ndarray
    text: str

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the frames."""
        return self.masks.shape[1:]


def make_sample(frames: np.ndarray, masks: np.ndarray, text: str, swapped_clamp: bool = False) -> ClipSample:
    """A sample with the boxes of its masks. The sentence is lower-cased and its blanks are made single."""
    boxes, valid = clip_targets(masks, swapped_clamp)
    return ClipSample(frames, masks, boxes, valid, " ".join(text.lower().split()))


def clip_targets(masks: np.ndarray, swapped_clamp: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 (T,4) and validity int64 (T,) of masks bool (T,H,W).

    A box holds the smallest and largest index of the mask along x and y, both inside, zeros where the mask is empty.
    swapped_clamp: clamp x to the height and y to the width, as `hengliusky/Few_shot_RVOS` does by mistake (CMA
    specification, section 9); only for studying that.
    """
    frames, height, width = masks.shape
    boxes = np.zeros((frames, 4), np.float32)
    valid = masks.any((1, 2))
    columns, rows = masks.any(1)[valid], masks.any(2)[valid]  # (n,W), (n,H)
    boxes[valid, 0], boxes[valid, 2] = columns.argmax(1), width - 1 - columns[:, ::-1].argmax(1)
    boxes[valid, 1], boxes[valid, 3] = rows.argmax(1), height - 1 - rows[:, ::-1].argmax(1)
    if swapped_clamp:
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, height)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, width)
    return boxes, valid.astype(np.int64)


def check(sample: ClipSample) -> ClipSample:
    """Mark frames whose box has no extent as invalid and set those boxes to zero."""
    valid = (sample.boxes[:, 2:] > sample.boxes[:, :2]).all(1)
    boxes = np.where(valid[:, None], sample.boxes, np.float32(0))
    return replace(sample, boxes=boxes, valid=valid.astype(np.int64))


def normalised_boxes(sample: ClipSample) -> np.ndarray:
    """Boxes as centre x, centre y, width, height over the frame size, float32 (T,4) in [0,1]."""
    low, high = sample.boxes[:, :2], sample.boxes[:, 2:]
    height, width = sample.size
    scale = np.array([width, height, width, height], np.float32)
    return np.concatenate(((low + high) / 2, high - low), axis=1) / scale


def flip(sample: ClipSample, whole_words: bool = True) -> ClipSample:
    """Mirror left and right, in the sentence too."""
    width = sample.size[1]
    x1, y1, x2, y2 = sample.boxes.T
    boxes = np.stack((width - x2, y1, width - x1, y2), axis=1).astype(np.float32)
    return ClipSample(
        sample.frames[:, :, ::-1], sample.masks[:, :, ::-1], boxes, sample.valid, swap_sides(sample.text, whole_words)
    )


def swap_sides(text: str, whole_words: bool = True) -> str:
    """Exchange left and right (also leftmost, rightwards, left-hand ...).

    whole_words=False exchanges the letters wherever they stand, as upstream does: "bright" turns into "bleft".
    """
    pattern = r"\b(left|right)(?=\b|most\b|wards?\b)" if whole_words else r"(left|right)"
    return re.sub(pattern, lambda found: "right" if found[0] == "left" else "left", text)


def resize_size(height: int, width: int, short: int, longest: int = 0) -> tuple[int, int]:
    """New (H, W) with the shorter side at `short`, less where the longer one would pass `longest` (0: no limit)."""
    low, high = min(height, width), max(height, width)
    if longest and high / low * short > longest:
        short = round(longest * low / high)
    other = int(short * high / low)
    return (short, other) if height <= width else (other, short)


def resize(sample: ClipSample, size: tuple[int, int]) -> ClipSample:
    """Resize to (H, W): frames bilinear with antialiasing, masks nearest, boxes scaled."""
    if size == sample.size:
        return sample
    old_height, old_width = sample.size
    scale = np.array([size[1] / old_width, size[0] / old_height] * 2, np.float32)
    frames = np.stack([resize_frame(frame, size) for frame in sample.frames])
    masks = resize_masks(sample.masks, size)
    return replace(sample, frames=frames, masks=masks, boxes=sample.boxes * scale)


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a frame, uint8 (H,W,3), to (H', W'): bilinear with antialiasing."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest resize of masks (T,H,W) to (H', W')."""
    return masks[:, _nearest(masks.shape[1], size[0])[:, None], _nearest(masks.shape[2], size[1])]


def crop(sample: ClipSample, top: int, left: int, height: int, width: int) -> ClipSample:
    """Cut a window out of every frame; boxes are shifted and cut to it."""
    window = (slice(None), slice(top, top + height), slice(left, left + width))
    low, high = np.float32([left, top] * 2), np.float32([width, height] * 2)
    boxes = (sample.boxes - low).clip(0, high)
    return replace(sample, frames=sample.frames[window], masks=sample.masks[window], boxes=boxes)


def augment_paper(sample: ClipSample, rng: np.random.Generator, whole_words: bool = True) -> ClipSample:
    """The augmentation that CMA was trained with (specification of CMA, section 7): flip, distort, crop and resize."""
    if rng.random() < 0.5:
        sample = flip(sample, whole_words)
    sample = replace(sample, frames=np.stack([distort(frame, rng) for frame in sample.frames]))
    if rng.random() >= 0.5:
        sample = resize(sample, resize_size(*sample.size, int(rng.choice(FIRST_SIDES))))
        height, width = (int(rng.integers(CROP_LOW, min(side, CROP_HIGH) + 1)) for side in sample.size)
        sample = crop_randomly(sample, height, width, rng)
    return check(resize(sample, resize_size(*sample.size, int(rng.choice(SHORT_SIDES)), LONGEST)))


def augment_tiny(sample: ClipSample, rng: np.random.Generator) -> ClipSample:
    """For small data whose sentences name colours and places: flip, and half the time a light zoom at the same size."""
    if rng.random() < 0.5:
        sample = flip(sample)
    if rng.random() < 0.5:
        size, share = sample.size, rng.uniform(TINY_ZOOM, 1)
        sample = crop_randomly(sample, round(size[0] * share), round(size[1] * share), rng)
        sample = resize(sample, size)
    return check(sample)


def crop_randomly(sample: ClipSample, height: int, width: int, rng: np.random.Generator) -> ClipSample:
    """Cut a window of this size at a place drawn uniformly."""
    top = int(rng.integers(0, sample.size[0] - height + 1))
    left = int(rng.integers(0, sample.size[1] - width + 1))
    return crop(sample, top, left, height, width)


def augment(name: str, sample: ClipSample, rng: np.random.Generator, whole_words: bool = True) -> ClipSample:
    """Apply the augmentation "paper", "tiny" or "none" by name. Raises InputError for another name."""
    if name == "paper":
        return augment_paper(sample, rng, whole_words)
    if name == "tiny":
        return augment_tiny(sample, rng)
    if name == "none":
        return check(sample)
    raise InputError(f"augment {name!r} is unknown: {near(name, ('paper', 'tiny', 'none'))}")


def _nearest(old: int, new: int) -> np.ndarray:
    # In float32 like the usual tensor libraries, so that both round alike.
    places = np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(np.int64)
    return places.clip(0, old - 1)
