"""J and F against a slow reference which follows the definition pixel by pixel."""

import math
import subprocess
import sys

import numpy as np
import pytest

from fewref.benchmark.metrics import boundary_counts, contour_accuracy, frame_scores, radius, region_similarity
from fewref.kernels.packed_bits import dilate, disk_rectangles


def edge_pixels(mask: np.ndarray) -> list[tuple[int, int]]:
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            if y < height - 1 and x < width - 1:
                others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            elif y < height - 1:
                others = [(y + 1, x)]
            elif x < width - 1:
                others = [(y, x + 1)]
            else:
                others = []
            if any(mask[y, x] != mask[other] for other in others):
                found.append((y, x))
    return found


def matched(these: list, those: list, reach: int) -> int:
    return sum(any((y - v) ** 2 + (x - u) ** 2 <= reach * reach for v, u in those) for y, x in these)


def slow_scores(pred: np.ndarray, gt: np.ndarray, reach: int) -> tuple[float, float, list[int]]:
    union = int((pred | gt).sum())
    j = int((pred & gt).sum()) / union if union else 1.0
    p, g = edge_pixels(pred), edge_pixels(gt)
    counts = [len(g), len(p), matched(g, p, reach), matched(p, g, reach)]
    if g and p:
        precision, recall = counts[3] / len(p), counts[2] / len(g)
        f = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    else:
        f = 1.0 if not g and not p else 0.0
    return j, f, counts


def random_masks(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    """Boxes, noise of any density, full and empty frames."""
    masks = np.zeros((frames, height, width), bool)
    for mask in masks:
        kind = rng.integers(4)
        if kind == 0:
            mask[:] = rng.random((height, width)) < rng.random() ** 2
        elif kind == 1:
            mask[:] = rng.random() < 0.5
        else:
            for _ in range(kind - 1):
                top, left = rng.integers(height), rng.integers(width)
                mask[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] ^= True
    return masks


SHAPES = [(1, 1), (1, 2), (2, 1), (1, 17), (70, 1), (2, 2), (3, 7), (7, 8), (8, 9), (13, 66), (31, 20), (20, 31)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize(("tolerance", "frames"), [(0.008, 3), (0.1, 8), (3, 11), (0, 2)])
def test_equals_the_definition(height: int, width: int, tolerance: float, frames: int) -> None:
    rng = np.random.default_rng([height, width, frames])
    pred, gt = random_masks(rng, frames, height, width), random_masks(rng, frames, height, width)
    gt[0] = np.roll(pred[0], (1, 1), (0, 1))
    j, f, counts = frame_scores(pred, gt, tolerance)
    reach = radius(height, width, tolerance)
    for t in range(frames):
        slow_j, slow_f, slow_counts = slow_scores(pred[t], gt[t], reach)
        assert (j[t], f[t], counts[t, 2:].tolist()) == (slow_j, slow_f, slow_counts)
    assert np.array_equal(region_similarity(pred, gt), j)
    assert np.array_equal(contour_accuracy(pred, gt, tolerance), f)
    assert j.dtype == f.dtype == np.float64


def test_void_is_cleared_before_the_boundary_is_drawn() -> None:
    rng = np.random.default_rng(5)
    pred, gt, void = (random_masks(rng, 9, 12, 15) for _ in range(3))
    j, f, counts = frame_scores(pred, gt, 0.1, void)
    for t in range(9):
        slow = slow_scores(pred[t] & ~void[t], gt[t] & ~void[t], radius(12, 15, 0.1))
        assert (j[t], f[t], counts[t, 2:].tolist()) == slow
    assert np.array_equal(region_similarity(pred, gt, void), j)


def blank(*pixels: tuple[int, int], full: bool = False) -> np.ndarray:
    mask = np.full((1, 40, 60), full)
    for y, x in pixels:
        mask[0, y, x] = True
    return mask


BLOCK = blank(*[(y, x) for y in range(10, 20) for x in range(10, 22)])
FAR = blank(*[(y, x) for y in range(30, 36) for x in range(45, 55)])


@pytest.mark.parametrize(
    ("gt", "pred", "j", "f"),
    [
        (blank(), blank(), 1.0, 1.0),
        (blank(), BLOCK, 0.0, 0.0),
        (BLOCK, blank(), 0.0, 0.0),
        (blank(), blank(full=True), 0.0, 1.0),
        (blank(full=True), blank(), 0.0, 1.0),
        (blank(full=True), blank(full=True), 1.0, 1.0),
        (blank(full=True), BLOCK, 120 / 2400, 0.0),
        (BLOCK, FAR, 0.0, 0.0),
        (BLOCK, BLOCK, 1.0, 1.0),
    ],
    ids=["empty", "only-pred", "only-gt", "empty-full", "full-empty", "full", "full-object", "apart", "equal"],
)
def test_degenerate_conventions(gt: np.ndarray, pred: np.ndarray, j: float, f: float) -> None:
    assert region_similarity(pred, gt).tolist() == [j]
    assert contour_accuracy(pred, gt).tolist() == [f]


def test_everything_void_scores_full_marks() -> None:
    void = np.ones_like(BLOCK)
    assert region_similarity(BLOCK, FAR, void).tolist() == contour_accuracy(BLOCK, FAR, void=void).tolist() == [1.0]


@pytest.mark.parametrize(
    ("mask", "edges"),
    [
        (blank((5, 5)), 4),
        (blank((0, 0)), 1),
        (blank((39, 59)), 3),
        (blank(*[(y, x) for y in range(40) for x in range(30)]), 40),
        (blank(full=True), 0),
    ],
    ids=["inside", "first-corner", "last-corner", "left-half", "full"],
)
def test_boundary_at_the_image_border(mask: np.ndarray, edges: int) -> None:
    assert boundary_counts(mask, mask).tolist() == [[edges] * 4]


def test_any_nonzero_value_is_foreground() -> None:
    rng = np.random.default_rng(7)
    pred, gt = random_masks(rng, 4, 9, 11), random_masks(rng, 4, 9, 11)
    scaled = frame_scores(pred * np.float32(0.01), gt * np.uint8(255), 2)
    for ours, theirs in zip(scaled, frame_scores(pred, gt, 2), strict=True):
        assert np.array_equal(ours, theirs)


def test_frames_do_not_influence_each_other() -> None:
    rng = np.random.default_rng(8)
    pred, gt = random_masks(rng, 21, 24, 30), random_masks(rng, 21, 24, 30)
    one_by_one = [contour_accuracy(pred[t : t + 1], gt[t : t + 1], 2)[0] for t in range(21)]
    assert contour_accuracy(pred, gt, 2).tolist() == one_by_one
    strided = np.asfortranarray(pred)[::-1], np.asfortranarray(gt)[::-1]
    assert contour_accuracy(*strided, 2).tolist() == one_by_one[::-1]
    assert contour_accuracy(pred[:0], gt[:0]).shape == (0,)


SIZES = [(240, 432, 4, 5), (360, 480, 5, 6), (360, 640, 6, 8), (480, 854, 8, 10), (720, 1280, 12, 15)]


@pytest.mark.parametrize(("height", "width", "davis", "few_shot"), [*SIZES, (1080, 1920, 18, 23), (300, 400, 4, 5)])
def test_radius(height: int, width: int, davis: int, few_shot: int) -> None:
    assert (radius(height, width, 0.008), radius(height, width, 0.010)) == (davis, few_shot)


@pytest.mark.parametrize("reach", range(41))
def test_rectangles_make_up_the_disk(reach: int) -> None:
    grid = np.arange(-reach, reach + 1)
    covered = np.zeros((2 * reach + 1, 2 * reach + 1), bool)
    for width, height in disk_rectangles(reach):
        covered[reach - height : reach + height + 1, reach - width : reach + width + 1] = True
    assert np.array_equal(covered, grid[:, None] ** 2 + grid**2 <= reach**2)


@pytest.mark.parametrize("reach", range(41))
def test_a_pixel_dilates_to_the_disk(reach: int) -> None:
    side, grid = 2 * reach + 1, np.arange(-reach, reach + 1)
    row, margin = side + reach, reach * (side + reach + 1)
    flat = np.zeros(side * row + 2 * margin, np.uint8)
    flat[margin + reach * row + reach] = 0b101
    grown = dilate(flat, row, reach).reshape(side, row)
    assert np.array_equal(grown[:, :side], 0b101 * (grid[:, None] ** 2 + grid**2 <= reach**2))


@pytest.mark.parametrize("tolerance", [-0.1, 1.5, math.nan])
def test_senseless_tolerance(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        contour_accuracy(BLOCK, BLOCK, tolerance)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        region_similarity(BLOCK, BLOCK[:, 1:])
    with pytest.raises(ValueError, match="one shape"):
        contour_accuracy(BLOCK[0], BLOCK[0])
    with pytest.raises(ValueError, match="void"):
        contour_accuracy(BLOCK, BLOCK, void=BLOCK[0])


def test_import_leaves_torch_alone() -> None:
    code = "import sys, fewref.benchmark.scoring, fewref.benchmark.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", code]).returncode == 0
