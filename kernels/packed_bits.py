"""Exact boundary matching for many frames at once: a byte holds one pixel of eight frames, one frame a bit.

In this layout a neighbour of a pixel is a neighbouring byte for all eight frames, so boundary, dilation and
intersection are a few OR, XOR and AND passes over short byte arrays, and no bit ever has to cross into another byte.
NumPy only: scoring processes import this module, and they should start quickly. `boundary` and `dilate` slice, and so
serve tensors as well (see `mask_scores`).
"""

from __future__ import annotations

import math

import numpy as np

FRAMES = 8


def frame_counts(pred: np.ndarray, gt: np.ndarray, radius: int) -> np.ndarray:
    """The six integers behind J and F of each frame.

    pred, gt: bool (T,H,W); radius: pixels, >= 0. Returns int64 (T,6): intersection, union, boundary pixels of gt and of
    pred, matched boundary pixels of gt and of pred. A boundary pixel is matched where the other map has one at a
    squared distance of at most radius^2 (spec scoring.md 1.2, 1.3).
    """
    counts = np.zeros((len(gt), 6), np.int64)
    for start in range(0, len(gt), FRAMES):
        part = slice(start, start + FRAMES)
        box = bounding_box(pred[part], gt[part])
        if box is not None:
            planes = np.stack([pack(gt[part, box[0], box[1]]), pack(pred[part, box[0], box[1]])])
            counts[part] = _count_planes(planes, len(gt[part]), radius)
    return counts


def bounding_box(pred: np.ndarray, gt: np.ndarray) -> tuple[slice, slice] | None:
    """Rows and columns of all foreground of bool (n,H,W) pairs, grown by one pixel inside the image; None if empty.

    With an empty margin, or the image's own border, at each side the boundary rule holds in the crop as in the image.
    """
    union = np.logical_or.reduce(gt, axis=0)
    np.logical_or(union, np.logical_or.reduce(pred, axis=0), out=union)
    # Searching a string of bytes for its first and last 1 is several times faster than any(axis=1).
    data, width = union.tobytes(), union.shape[1]
    first = data.find(1)
    if first < 0:
        return None
    top, bottom = first // width, data.rfind(1) // width
    columns = np.flatnonzero(union[top : bottom + 1].any(axis=0))
    return slice(max(top - 1, 0), bottom + 2), slice(max(int(columns[0]) - 1, 0), int(columns[-1]) + 2)


def pack(frames: np.ndarray) -> np.ndarray:
    """bool (n,h,w), n <= 8, to uint8 (h,w): bit k is frame k."""
    packed = frames[-1].astype(np.uint8)
    for frame in frames[-2::-1]:
        packed += packed
        packed |= frame.view(np.uint8)
    return packed


def boundary(planes: np.ndarray, out: np.ndarray) -> None:
    """Write the boundary maps of uint8 (...,h,w) planes to `out`, of the same shape and zero where nothing is written.

    A pixel is boundary when it differs from its right, lower or lower-right neighbour, as far as these exist.
    """
    out[..., :, :-1] = planes[..., :, :-1] ^ planes[..., :, 1:]
    out[..., :-1, :] |= planes[..., :-1, :] ^ planes[..., 1:, :]
    out[..., :-1, :-1] |= planes[..., :-1, :-1] ^ planes[..., 1:, 1:]


def disk_rectangles(radius: int) -> list[tuple[int, int]]:
    """Half widths and half heights, narrowest first, of the rectangles whose union is dx^2 + dy^2 <= radius^2."""
    half_widths = [math.isqrt(radius * radius - dy * dy) for dy in range(radius + 1)]
    # Half widths never grow with dy, so the count of those that reach a width is one more than its half height.
    return [(width, sum(other >= width for other in half_widths) - 1) for width in sorted(set(half_widths))]


def dilate(flat: np.ndarray, row: int, radius: int) -> np.ndarray:
    """OR over the disk of `radius`, for maps laid out in one string of bytes.

    flat: uint8 (n,), rows of `row` bytes of which the last `radius` are zero, with radius * (row + 1) zeros before the
    first map and after the last one, and `radius` zero rows between maps. Returns uint8 (n - 2 * radius * (row + 1),):
    the dilated bytes between the two margins.

    The rectangles of the disk are chained: the narrow ones grow upwards and downwards together while wider ones join.
    All growth looks forward only, and slices put the results in place; the lengths keep account of the offset.
    """
    (width, height), *wider = disk_rectangles(radius)
    line = result = _grow(flat, 1, 2 * width)
    for next_width, next_height in wider:
        result = _grow(result, row, 2 * (height - next_height))
        line = _grow(line, 1, 2 * (next_width - width), reach=2 * width + 1)
        aside, below = next_width - width, (radius - next_height) * row
        size = len(result) - 2 * aside
        result = result[aside : aside + size] | line[below : below + size]
        width, height = next_width, next_height
    return _grow(result, row, 2 * height)


def _grow(flat: np.ndarray, step: int, count: int, reach: int = 1) -> np.ndarray:
    """OR of flat[x], flat[x + step] ... flat[x + count * step]; `reach` such terms are already in each byte."""
    done = 0
    while done < count:
        jump = min(reach + done, count - done)
        flat = flat[: -jump * step] | flat[jump * step :]
        done += jump
    return flat


def _count_planes(planes: np.ndarray, frames: int, radius: int) -> np.ndarray:
    """uint8 (2,h,w) of gt and pred to int64 (frames,6), the counts of `frame_counts` for each bit in use."""
    _, height, width = planes.shape
    row, margin = width + radius, radius * (width + radius + 1)
    size = 2 * (height + radius) * row
    flat = np.zeros(size + 2 * margin, np.uint8)
    edges = flat[margin : margin + size].reshape(2, height + radius, row)
    boundary(planes, edges[:, :height, :width])
    matched = edges & dilate(flat, row, radius).reshape(edges.shape)[::-1]
    maps = (planes[0] & planes[1], planes[0] | planes[1], edges[0], edges[1], matched[0], matched[1])
    return np.array([[np.count_nonzero(item & np.uint8(1 << bit)) for item in maps] for bit in range(frames)])
