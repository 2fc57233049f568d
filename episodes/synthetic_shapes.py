"""What a synthetic category looks like: twelve outlines times eight surface patterns, functions of pixel coordinates.

Only +, *, abs, sqrt, min and max touch arrays, so the pixels are the same on every machine.
"""

from __future__ import annotations

import math

import numpy as np

SHAPES = (
    "disc",
    "square",
    "triangle",
    "cross",
    "star",
    "ring",
    "crescent",
    "bar",
    "heart",
    "arrow",
    "corner",
    "hourglass",
)
PATTERNS = ("plain", "rows", "columns", "diagonal", "checks", "dots", "rings", "halves")

_STAR = tuple(
    ((1.2, 0.52)[k % 2] * math.sin(k * math.pi / 5), -(1.2, 0.52)[k % 2] * math.cos(k * math.pi / 5)) for k in range(10)
)
_CORNERS = {  # in units of the radius, x to the right, y down
    "square": ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": ((0, -1.1), (1.08, 0.85), (-1.08, 0.85)),
    "cross": (
        *((0.36, -1.1), (0.36, -0.36), (1.1, -0.36), (1.1, 0.36), (0.36, 0.36), (0.36, 1.1)),
        *((-0.36, 1.1), (-0.36, 0.36), (-1.1, 0.36), (-1.1, -0.36), (-0.36, -0.36), (-0.36, -1.1)),
    ),
    "star": _STAR,
    "arrow": ((-1.1, -0.34), (0.05, -0.34), (0.05, -0.95), (1.15, 0), (0.05, 0.95), (0.05, 0.34), (-1.1, 0.34)),
    "corner": ((-0.85, -1.05), (-0.15, -1.05), (-0.15, 0.35), (0.9, 0.35), (0.9, 1.0), (-0.85, 1.0)),
    "hourglass": ((-0.95, -1.05), (0.95, -1.05), (0.2, 0), (0.95, 1.05), (-0.95, 1.05), (-0.2, 0)),
    "heart": ((-0.97, -0.1), (0, -0.15), (0.97, -0.1), (0, 1.1)),
}


def look(category_id: int) -> tuple[str, str]:
    """(shape, pattern) of a category id from 1 on.

    Classes whose ids agree modulo 4 (one of the four groups) hold every shape once; the same shape returns in the other
    groups with other patterns, so a novel class is an unseen combination of a seen shape and a seen pattern. The ids
    from 49 on, of the pretraining set, are the 48 combinations that those up to 48 leave.
    """
    shape, group = (category_id - 1) // 4, (category_id - 1) % 4
    return SHAPES[shape % len(SHAPES)], PATTERNS[(shape + 3 * group) % len(PATTERNS)]


def outline(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in units of the radius, negative inside; u, v float64, in units of the radius."""
    if shape == "disc":
        return np.sqrt(u * u + v * v) - 0.97
    if shape == "ring":
        return np.abs(np.sqrt(u * u + v * v) - 0.76) - 0.29
    if shape == "crescent":
        return np.maximum(np.sqrt(u * u + v * v) - 1.08, 0.78 - np.sqrt((u - 0.5) ** 2 + v * v))
    if shape == "bar":
        along = u - np.clip(u, -0.7, 0.7)
        return np.sqrt(along * along + v * v) - 0.48
    if shape == "heart":
        lobes = np.sqrt((np.abs(u) - 0.46) ** 2 + (v + 0.35) ** 2) - 0.57
        return np.minimum(lobes, _polygon(_CORNERS["heart"], u, v))
    return _polygon(_CORNERS[shape], u, v)


def _polygon(corners: tuple, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to a simple polygon: nearest edge, sign by the crossing number."""
    nearest = np.full(u.shape, np.inf)
    inside = np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        du, dv = u - ax, v - ay
        along = np.clip((du * ex + dv * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, (du - along * ex) ** 2 + (dv - along * ey) ** 2)
        if ey != 0:
            inside ^= ((v >= ay) != (v >= by)) & (du < dv * (ex / ey))
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def surface(pattern: str, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Share of the bright tone in [0,1]; x, y: pixels from the object's centre, along its axes; period: pixels."""
    if pattern == "plain":
        return np.ones_like(x)
    if pattern == "halves":
        return np.clip(0.5 - y, 0.0, 1.0)
    if pattern == "checks":
        a, b = _stripes(x, 1.5 * period), _stripes(y, 1.5 * period)
        return a * (1 - b) + b * (1 - a)
    if pattern == "dots":
        gap = 1.15 * period
        dx, dy = x / gap - np.floor(x / gap) - 0.5, y / gap - np.floor(y / gap) - 0.5
        return np.clip((np.sqrt(dx * dx + dy * dy) - 0.34) * gap + 0.5, 0.0, 1.0)
    along = {"rows": lambda: y, "columns": lambda: x, "diagonal": lambda: (x + y) * math.sqrt(0.5)}
    return _stripes(along[pattern]() if pattern in along else np.sqrt(x * x + y * y), period)


def _stripes(position: np.ndarray, period: float) -> np.ndarray:
    phase = position / period - np.floor(position / period)
    return np.clip((0.25 - np.abs(phase - 0.5)) * period + 0.5, 0.0, 1.0)
