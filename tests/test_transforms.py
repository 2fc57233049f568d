"""Augmentation of training clips."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fewref.episodes import transforms
from fewref.episodes.errors import InputError
from fewref.episodes.photometric import distort, hsv_to_rgb, rgb_to_hsv
from fewref.episodes.transforms import (
    augment,
    check,
    clip_targets,
    crop,
    flip,
    make_sample,
    normalised_boxes,
    resize,
    resize_masks,
    swap_sides,
)


def sample(seed: int = 0, size: tuple[int, int] = (60, 100), frames: int = 3):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (frames, *size, 3)).astype(np.uint8)
    masks = np.zeros((frames, *size), bool)
    for t in range(frames - 1):  # the last frame has no object
        masks[t, 10 + t : 31 + t, 20 : 51 + t] = True
    return make_sample(pixels, masks, "The  Red cat\non the LEFT")


def test_make_sample_finds_boxes_and_cleans_the_sentence() -> None:
    made = sample()
    np.testing.assert_array_equal(made.boxes, [[20, 10, 50, 30], [20, 11, 51, 31], [0, 0, 0, 0]])
    np.testing.assert_array_equal(made.valid, [1, 1, 0])
    assert made.boxes.dtype == np.float32
    assert made.text == "the red cat on the left"


def test_boxes_reach_the_far_edge_unless_the_axes_are_swapped() -> None:
    masks = np.zeros((1, 40, 96), bool)
    masks[0, 5:9, 60:90] = True
    assert clip_targets(masks)[0].tolist() == [[60, 5, 89, 8]]
    assert clip_targets(masks, swapped_clamp=True)[0].tolist() == [[40, 5, 40, 8]]


def test_flip_mirrors_everything_and_undoes_itself() -> None:
    made = sample()
    there = flip(made)
    assert there.text == "the red cat on the right"
    np.testing.assert_array_equal(there.masks[0], made.masks[0][:, ::-1])
    np.testing.assert_array_equal(there.boxes[0], [50, 10, 80, 30])
    back = flip(there)
    np.testing.assert_array_equal(back.frames, made.frames)
    np.testing.assert_array_equal(back.boxes, made.boxes)
    assert back.text == made.text


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("a dog moving left", "a dog moving right"),
        ("the bright leftover right of it", "the bright leftover left of it"),
        ("left-hand, then rightmost and leftwards", "right-hand, then leftmost and rightwards"),
        ("to the right, to the left", "to the left, to the right"),
        ("standing upright", "standing upright"),
    ],
)
def test_sides_are_swapped_as_words(text: str, mirrored: str) -> None:
    assert swap_sides(text) == mirrored
    assert swap_sides(mirrored) == text


def test_upstream_swaps_letters_inside_words() -> None:
    assert swap_sides("the bright cat", whole_words=False) == "the bleft cat"


def test_resize_scales_boxes_and_picks_nearest_mask_pixels() -> None:
    made = sample()
    small = resize(made, (45, 75))
    assert small.frames.shape == (3, 45, 75, 3)
    np.testing.assert_allclose(small.boxes[0], np.array([20, 10, 50, 30]) * 0.75, rtol=1e-6)
    rng = np.random.default_rng(3)
    for size in [(31, 57), (64, 200), (60, 100), (59, 101)]:
        masks = rng.random((2, 60, 100)) > 0.5
        wanted = F.interpolate(torch.from_numpy(masks[None]).float(), size, mode="nearest")[0] > 0
        np.testing.assert_array_equal(resize_masks(masks, size), wanted)


def test_crop_cuts_boxes_and_check_drops_empty_ones() -> None:
    made = sample()
    part = crop(made, 15, 30, 20, 60)
    assert part.frames.shape == (3, 20, 60, 3)
    np.testing.assert_array_equal(part.boxes[0], [0, 0, 20, 15])
    away = check(crop(made, 40, 60, 20, 40))
    assert away.valid.tolist() == [0, 0, 0]
    assert not away.boxes.any()


def test_normalised_boxes() -> None:
    np.testing.assert_allclose(normalised_boxes(sample())[0], [0.35, 20 / 60, 0.3, 20 / 60], rtol=1e-6)


def test_hsv_is_that_of_opencv() -> None:
    image = np.random.default_rng(0).uniform(-30, 290, (50, 60, 3)).astype(np.float32)
    hue, saturation, value = rgb_to_hsv(image)
    wanted = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    np.testing.assert_allclose(np.stack((hue, saturation, value), -1), wanted, atol=1e-4)
    moved = wanted * np.float32([1, 1.4, 1])
    back = hsv_to_rgb(hue, saturation * np.float32(1.4), value)
    np.testing.assert_allclose(back, cv2.cvtColor(moved, cv2.COLOR_HSV2RGB), atol=2e-3)


class Fixed:
    """A generator whose draws are given."""

    def __init__(self, chances: list[float], values: list[float]) -> None:
        self.chances, self.values = chances, values

    def random(self) -> float:
        return self.chances.pop(0)

    def uniform(self, low: float, high: float) -> float:
        value = self.values.pop(0)
        assert low <= value <= high
        return value

    def permutation(self, count: int) -> np.ndarray:
        return np.arange(count)[::-1]


def test_distortion_wraps_and_permutes() -> None:
    frame = np.array([[[250, 100, 3]]], np.uint8)
    # brightness yes, contrast last (order draw), no saturation, no hue, contrast no, permutation yes
    lighter = distort(frame, Fixed([0.1, 0.9, 0.9, 0.9, 0.9, 0.1], [20.0]))
    assert lighter.tolist() == [[[23, 120, 270 - 256]]]
    darker = distort(frame, Fixed([0.1, 0.9, 0.9, 0.9, 0.1, 0.9], [-10.0, 1.5]))
    assert darker.tolist() == [[[360 - 256, 135, 256 - 10]]]
    assert (distort(frame, Fixed([0.9] * 6, [])) == frame).all()


def test_tiny_keeps_size_and_colours() -> None:
    made = sample()
    seen = set()
    for seed in range(20):
        result = augment("tiny", made, np.random.default_rng(seed))
        assert result.size == made.size
        seen.add(result.text)
        assert abs(result.frames.mean((0, 1, 2)) - made.frames.mean((0, 1, 2))).max() < 4
        boxes, valid = clip_targets(result.masks)
        np.testing.assert_array_equal(result.valid, valid)
        np.testing.assert_allclose(result.boxes, boxes, atol=2.5)
    assert seen == {"the red cat on the left", "the red cat on the right"}


def test_paper_sizes_and_determinism() -> None:
    made = sample(size=(90, 160), frames=2)
    for seed in range(6):
        first, second = (augment("paper", made, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(first.frames, second.frames)
        assert first.size == first.frames.shape[1:3]
        assert max(first.size) <= transforms.LONGEST + 1
        assert min(first.size) in transforms.SHORT_SIDES or max(first.size) >= transforms.LONGEST - 1
        boxes, _ = clip_targets(first.masks)
        np.testing.assert_allclose(first.boxes, boxes, atol=9)  # sizes grow up to six times, indices are inclusive


def test_none_only_checks() -> None:
    made = sample()
    np.testing.assert_array_equal(augment("none", made, np.random.default_rng(0)).frames, made.frames)


def test_unknown_augmentation() -> None:
    with pytest.raises(InputError, match="did you mean 'tiny'"):
        augment("tinny", sample(), np.random.default_rng(0))
