"""A support set as a series of small training tasks: which shot is the target in a step, and how it is varied.

Adaptation specification, 3 and 9. The draws of a step depend on the seed, the step and the clip alone, so that two
strategies see the same variants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fewref.episodes.draws import generator
from fewref.episodes.transforms import resize_frame, resize_masks, swap_sides
from fewref.episodes.types import Shot
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.adaptation.record import AdaptationError

ZOOM, SHIFT, COLOUR = 0.1, 0.1, 0.1  # largest change as a share
KEPT = 0.8  # of the object's area, at least
TRIES = 10


def tasks(
    shots: Sequence[Shot], options: AdaptOptions, seed: int, memory: bool = True
) -> Callable[[int], tuple[Shot, list[Shot]]]:
    """The task of each step, from 0: a target to learn, and the shots that a method may look at meanwhile.

    The shots take turns in their order, those that never show the object left out. memory: the method looks at other
    shots; then a target is never among them: with one shot alone, one half of the clip (in time) is the target and the
    other one the memory; a single frame, or an object seen in one half alone, leaves no choice but the whole clip for
    both. Raises AdaptationError where no shot shows its object.
    """
    pairs = _pairs(shots, memory)

    def task(step: int) -> tuple[Shot, list[Shot]]:
        target, others = pairs[step % len(pairs)]
        if options.augment:
            target = vary(target, step_generator(seed, step, target))
        return target, others

    return task


def check_visible(shots: Sequence[Shot]) -> None:
    """Raises AdaptationError where no shot shows its object in any frame."""
    if not any(shot.masks.any() for shot in shots):
        raise AdaptationError(
            "the support never shows its object (its masks are empty); nothing can be learned from it"
        )


def step_generator(seed: int, step: int, shot: Shot) -> np.random.Generator:
    """The generator of what is drawn for one clip in one step."""
    return generator("adapt", seed, step, shot.clip.dataset, shot.clip.video, *shot.clip.frames)


def _pairs(shots: Sequence[Shot], memory: bool) -> list[tuple[Shot, list[Shot]]]:
    check_visible(shots)
    places = [place for place, shot in enumerate(shots) if shot.masks.any()]
    if not memory:
        return [(shots[place], list(shots)) for place in places]
    if len(shots) == 1:
        return _halves(shots[0])
    others = [[*shots[:place], *shots[place + 1 :]] for place in places]
    return [(_shorten(shots[place], rest), rest) for place, rest in zip(places, others, strict=True)]


def _halves(shot: Shot) -> list[tuple[Shot, list[Shot]]]:
    """Each half of a clip as the target of the other; an odd frame goes to the memory."""
    frames = len(shot.frames)
    short = frames // 2
    ranges = [(range(short, frames), range(short)), (range(frames - short), range(frames - short, frames))]
    halves = [(part(shot, target), [part(shot, kept)]) for kept, target in ranges]
    seen = [(target, kept) for target, kept in halves if target.masks.any() and kept[0].masks.any()]
    return seen or [(shot, [shot])]


def _shorten(target: Shot, others: Sequence[Shot]) -> Shot:
    """At most as many frames as the shortest other shot, around the middle of those that show the object: methods that
    pair frames need it."""
    wanted = min(len(other.frames) for other in others)
    if len(target.frames) <= wanted:
        return target
    seen = np.flatnonzero(target.masks.any((1, 2)))
    first = int(np.clip(seen[len(seen) // 2] - wanted // 2, 0, len(target.frames) - wanted))
    return part(target, range(first, first + wanted))


def part(shot: Shot, places: Sequence[int]) -> Shot:
    """Some frames of a shot, by place."""
    chosen = list(places)
    clip = dataclasses.replace(shot.clip, frames=tuple(shot.clip.frames[place] for place in chosen))
    return dataclasses.replace(shot, clip=clip, frames=shot.frames[chosen], masks=shot.masks[chosen])


def vary(shot: Shot, rng: np.random.Generator) -> Shot:
    """A shot mirrored (with "left" and "right" of its sentence exchanged), zoomed, shifted and recoloured a little.

    One draw serves all frames; at least 80 % of the object's area stays inside, else place and zoom stay as they are.
    """
    frames, masks, text = shot.frames, shot.masks, shot.expression.text
    if rng.random() < 0.5:
        frames, masks = frames[..., ::-1], masks[..., ::-1]
        text = swap_sides(" ".join(text.lower().split()))
    frames, masks = _move(frames, masks, rng)
    expression = dataclasses.replace(shot.expression, text=text)
    frames, masks = _recolour(frames, *rng.uniform(1 - COLOUR, 1 + COLOUR, 3)), np.ascontiguousarray(masks)
    return dataclasses.replace(shot, expression=expression, frames=frames, masks=masks)


def _move(frames: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Zoom and shift by reading another window, which repeats the border where it leaves the frame."""
    height, width = masks.shape[1:]
    for _ in range(TRIES):
        zoom = rng.uniform(1 - ZOOM, 1 + ZOOM)
        high, wide = round(height / zoom), round(width / zoom)
        down, right = rng.uniform(-SHIFT, SHIFT, 2) * (height, width)
        top, left = (height - high) // 2 + round(down), (width - wide) // 2 + round(right)
        inside = masks[:, max(top, 0) : top + high, max(left, 0) : left + wide]
        if inside.sum() >= KEPT * masks.sum():
            break
    else:
        return frames, masks
    rows = np.arange(top, top + high).clip(0, height - 1)[:, None]
    columns = np.arange(left, left + wide).clip(0, width - 1)
    moved = np.stack([resize_frame(frame.transpose(1, 2, 0), (height, width)) for frame in frames[:, :, rows, columns]])
    return moved.transpose(0, 3, 1, 2), resize_masks(masks[:, rows, columns], (height, width))


def _recolour(frames: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """uint8 (T,3,H,W), each factor around 1; contrast about the clip's mean grey."""
    pixels = frames.astype(np.float32) * np.float32(brightness)
    grey = np.tensordot(np.float32([0.299, 0.587, 0.114]), pixels, (0, 1))[:, None]  # (T,1,H,W)
    pixels = grey + (pixels - grey) * np.float32(saturation)
    middle = grey.mean(dtype=np.float64).astype(np.float32)
    pixels = middle + (pixels - middle) * np.float32(contrast)
    return np.ascontiguousarray(pixels.round().clip(0, 255).astype(np.uint8))
