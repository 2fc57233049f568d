"""A synthetic video: which objects it shows, where they go, and its pixels."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fewref.episodes.errors import InputError
from fewref.episodes.synthetic_shapes import look, outline, surface

COLOURS = {
    "red": (222, 38, 38),
    "orange": (243, 132, 24),
    "yellow": (236, 218, 48),
    "green": (44, 176, 62),
    "cyan": (58, 208, 216),
    "blue": (42, 76, 224),
    "purple": (146, 52, 196),
    "pink": (246, 132, 190),
}
SIZES = {"small": (11.0, 13.0), "big": (18.0, 22.0)}  # radius in pixels of a 96x128 image
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
DARK = 0.45  # the second tone of a pattern


@dataclass(frozen=True, eq=False)
class Thing:
    """One object. centres: float64 (T,2), x and y in pixels; radii, angles: float64 (T,), pixels and radians."""

    category: str
    shape: str
    pattern: str
    colour: str
    rgb: tuple[int, int, int]
    size: str
    motion: str
    centres: np.ndarray
    radii: np.ndarray
    angles: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """A video without its pixels. things: back to front; amodal, visible: bool (N,T,H,W), without and with occlusion.

    alphas: per object and frame (rows, columns, coverage) of the box around it.
    """

    things: tuple[Thing, ...]
    amodal: np.ndarray
    visible: np.ndarray
    alphas: tuple[tuple[tuple, ...], ...]


@dataclass(frozen=True)
class Cast:
    """What a scene must hold. Categories are pairs (name, id that gives the look); the first `primaries` objects are of
    `category`, the others of distinct `others`. leaver: one object moves out of the image. alike: how often one of the
    others has the colour of one of the first."""

    category: tuple[str, int]
    others: tuple[tuple[str, int], ...]
    primaries: int = 2
    distinct_colours: bool = False
    leaver: bool = False
    alike: float = 0.5


def generator(key: str) -> np.random.Generator:
    """A generator of its own for a string: nothing that is drawn from another one shifts it."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32))


def plan_scene(rng: np.random.Generator, cast: Cast, frames: int, size: tuple[int, int]) -> Scene:
    """Draw attributes and paths until every object shows at least 30 % of itself in every frame (a leaver excepted).

    Raises InputError where `frames` and `size` leave no room for such a scene.
    """
    for _ in range(5000):
        wanted = _attributes(rng, cast)
        room = 0.62 if rng.random() < 0.4 else 0.92  # how near two objects come, in sums of their radii
        paths = _paths(rng, wanted, frames, size, room, cast.leaver)
        if paths is None:
            continue
        order = rng.permutation(len(wanted))
        things = tuple(_thing(rng, wanted[k], *paths[k], size) for k in order)
        alphas = tuple(_alphas(thing, size) for thing in things)
        amodal, visible = _masks(alphas, size)
        shown = visible.sum((2, 3)) / np.maximum(amodal.sum((2, 3)), 1)
        keeps = [k for k in range(len(order)) if not (cast.leaver and order[k] == 0)]
        if shown[keeps].min() >= 0.3 and visible.any((2, 3)).sum(1).min() >= frames // 2:
            return Scene(things, amodal, visible, alphas)
    place = f"{frames} frames of {size[0]}x{size[1]}"
    raise InputError(f"{place} have no room for {len(wanted)} objects; give more frames or larger ones")


def _attributes(rng: np.random.Generator, cast: Cast) -> list[dict]:
    """Colour, size and motion of each object: two of a category differ, a distractor often shares what they have."""
    colours, sizes, motions = tuple(COLOURS), tuple(SIZES), tuple(MOTIONS)
    wanted = []
    for _ in range(cast.primaries):
        pick = {"category": cast.category, "colour": colours[rng.integers(8)]}
        pick |= {"size": sizes[rng.integers(2)], "motion": motions[rng.integers(5)]}
        wanted.append(pick)
    if cast.primaries == 2 and (cast.distinct_colours or rng.random() < 0.8):
        first = colours.index(wanted[0]["colour"])
        wanted[1]["colour"] = colours[(first + 1 + rng.integers(7)) % 8]
    elif cast.primaries > 1:  # some share a colour, so size, place or motion must tell them apart
        wanted[1]["colour"] = wanted[0]["colour"]
    if cast.primaries > 2:  # a pair that moves alike, for sentences about several objects
        wanted[1]["motion"] = wanted[0]["motion"]
        wanted[2]["motion"] = motions[(motions.index(wanted[0]["motion"]) + 1 + rng.integers(4)) % 5]
    for other in cast.others:
        model = wanted[rng.integers(cast.primaries)]
        pick = {"category": other, "colour": model["colour"] if rng.random() < cast.alike else colours[rng.integers(8)]}
        pick["size"] = model["size"] if rng.random() < 0.4 else sizes[rng.integers(2)]
        wanted.append(pick | {"motion": motions[rng.integers(5)]})
    if cast.leaver:
        wanted[0]["motion"] = motions[rng.integers(4)]
    return wanted


def _paths(rng, wanted: list[dict], frames: int, size: tuple[int, int], room: float, leaver: bool) -> list | None:
    """(centres (T,2), radius) of each object, kept inside the image and apart by `room`; None where that fails."""
    height, width = size
    scale = min(height / 96, width / 128)
    extent = np.array([width, height], float)
    time = np.arange(frames) - (frames - 1) / 2
    paths: list[tuple[np.ndarray, float]] = []
    for k, pick in enumerate(wanted):
        low, high = SIZES[pick["size"]]
        radius = scale * (low + (high - low) * rng.random())
        heading = np.array(MOTIONS[pick["motion"]], float)
        speed = scale * (2.2 + 1.0 * rng.random()) * (0.8 if heading[1] else 1.0) * min(1.0, 9 / frames)
        if leaver and k == 0:  # fast enough to be seen in half of the frames before it is gone
            speed = max(speed, 0.9 * radius / (frames - max(2, frames // 4) - frames // 2 + 1))
        for _ in range(40):
            margin = np.minimum(0.8 * radius + np.abs(heading) * speed * (frames - 1) / 2, extent / 2)
            centre = margin + (extent - 2 * margin) * rng.random(2)
            if leaver and k == 0:  # out of sight in the last quarter
                edge = np.where(heading > 0, extent, 0.0)
                out = edge + heading * (1.3 * radius - speed * time[-max(2, frames // 4)])
                centre = np.where(heading != 0, out, centre)
            centres = centre + time[:, None] * speed * heading
            gaps = (np.sqrt(((centres - c) ** 2).sum(1)).min() / (radius + r) for c, r in paths)
            if all(gap >= room for gap in gaps):
                paths.append((centres, radius))
                break
        else:
            return None
    return paths


def _thing(rng, pick: dict, centres: np.ndarray, radius: float, size: tuple[int, int]) -> Thing:
    frames = len(centres)
    name, category_id = pick["category"]
    swing, tilt, phase = 0.12 * rng.random(), 0.12 * (2 * rng.random() - 1), 6.28 * rng.random()
    wave = np.array([math.sin(phase + 0.35 * t) for t in range(frames)])
    rgb = tuple(int(np.clip(c + rng.integers(-9, 10), 0, 255)) for c in COLOURS[pick["colour"]])
    shape, pattern = look(category_id)
    return Thing(
        category=name,
        shape=shape,
        pattern=pattern,
        colour=pick["colour"],
        rgb=rgb,
        size=pick["size"],
        motion=pick["motion"],
        centres=centres,
        radii=radius * (1 + 0.04 * wave[::-1]),
        angles=tilt + swing * wave,
    )


def _alphas(thing: Thing, size: tuple[int, int]) -> tuple[tuple, ...]:
    """Per frame (rows, columns, coverage float64 (h,w) in [0,1]) of the box around the object; empty boxes allowed."""
    result = []
    for t in range(len(thing.centres)):
        rows, columns, x, y = _axes(thing, t, size)
        radius = thing.radii[t]
        distance = outline(thing.shape, x / radius, y / radius) * radius
        result.append((rows, columns, np.clip(0.5 - distance, 0.0, 1.0)))
    return tuple(result)


def _axes(thing: Thing, t: int, size: tuple[int, int]) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The box of the image around an object, and its pixels' coordinates along the object's own (turned) axes."""
    (cx, cy), reach = thing.centres[t], 1.5 * thing.radii[t]
    top, bottom = (int(np.clip(v, 0, size[0])) for v in (cy - reach, cy + reach + 1))
    left, right = (int(np.clip(v, 0, size[1])) for v in (cx - reach, cx + reach + 1))
    dy, dx = np.arange(top, bottom)[:, None] - cy, np.arange(left, right)[None] - cx
    c, s = math.cos(thing.angles[t]), math.sin(thing.angles[t])
    return slice(top, bottom), slice(left, right), c * dx + s * dy, c * dy - s * dx


def _masks(alphas: tuple, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    amodal = np.zeros((len(alphas), len(alphas[0]), *size), bool)
    for n, boxes in enumerate(alphas):
        for t, (rows, columns, alpha) in enumerate(boxes):
            amodal[n, t, rows, columns] = alpha >= 0.5
    visible = amodal.copy()
    for n in range(len(alphas) - 1):
        visible[n] &= ~amodal[n + 1 :].any(0)
    return amodal, visible


def paint(rng: np.random.Generator, scene: Scene, blocky: bool = False) -> np.ndarray:
    """The video's pixels, uint8 (T,H,W,3) RGB: the objects over a muted, slowly panning background."""
    frames, height, width = scene.visible.shape[1:]
    backdrop = _backdrop(rng, height + 16, width + 16, blocky)
    start, pan = 8.0, (rng.random(2) - 0.5) * 14 / frames
    video = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        top, left = (int(round(start + p * (t - frames / 2))) for p in pan)
        canvas = backdrop[top : top + height, left : left + width].copy()
        for n, thing in enumerate(scene.things):
            rows, columns, alpha = scene.alphas[n][t]
            if alpha.size:
                x, y = _axes(thing, t, (height, width))[2:]
                bright = surface(thing.pattern, x, y, max(0.42 * thing.radii[t], 5.2))
                tone = (DARK + (1 - DARK) * bright)[..., None] * np.array(thing.rgb, float)
                canvas[rows, columns] += alpha[..., None] * (tone - canvas[rows, columns])
        video[t] = np.clip(canvas + 0.5, 0, 255)
    return video


def _backdrop(rng: np.random.Generator, height: int, width: int, blocky: bool) -> np.ndarray:
    """float64 (height,width,3): coarse noise, a gradient and grain, all of low saturation."""
    coarse = rng.integers(0, 60, (6, 8, 1)) + rng.integers(0, 22, (6, 8, 3))
    mode = Image.Resampling.NEAREST if blocky else Image.Resampling.BICUBIC
    # Pillow resizes bytes with integers, which unlike floats in a matrix product agree on every processor
    noise = np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((width, height), mode), float)
    slope = (rng.random(2) - 0.5) * 50
    ramp = np.linspace(-0.5, 0.5, height)[:, None] * slope[0] + np.linspace(-0.5, 0.5, width)[None] * slope[1]
    grain = rng.integers(-7, 8, (height, width, 1))
    return np.clip(60 + 60 * rng.random() + noise + ramp[..., None] + grain, 0, 255)
