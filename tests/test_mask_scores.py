"""Counting on the device against the packed bytes, which test_metrics holds to the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewref.benchmark.judge import Packed, device_counts, judge
from fewref.benchmark.metrics import radius
from fewref.episodes.errors import InputError
from fewref.kernels import mask_scores, packed_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_masks(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """Noise of any density, blocks, and among them empty and full frames."""
    rng = np.random.default_rng(seed)
    masks = rng.random((frames, height, width)) < rng.random((frames, 1, 1)) ** 2
    for mask in masks[::3]:
        top, left = rng.integers(height), rng.integers(width)
        mask[:] = False
        mask[top : top + height // 2 + 1, left : left + width // 2 + 1] = True
    masks[1::5] = rng.random() < 0.5
    return masks


def on_device(pred: np.ndarray, gt: np.ndarray, reach: int) -> np.ndarray:
    counts = mask_scores.frame_counts(torch.from_numpy(pred).to(DEVICE), torch.from_numpy(gt).to(DEVICE), reach)
    assert (counts.dtype, counts.device.type, tuple(counts.shape)) == (torch.int64, DEVICE, (len(gt), 6))
    return counts.cpu().numpy()


SIZES = [(1, 1), (1, 2), (2, 1), (1, 33), (50, 1), (2, 2), (7, 8), (13, 31), (40, 25)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("frames", "reach"), [(1, 0), (7, 1), (8, 3), (11, 12), (19, 60)])
def test_equals_the_packed_bytes(height: int, width: int, frames: int, reach: int) -> None:
    pred, gt = random_masks(frames, height, width, reach), random_masks(frames, height, width, reach + 1)
    assert np.array_equal(on_device(pred, gt, reach), packed_bits.frame_counts(pred, gt, reach))


@pytest.mark.parametrize("frames", [0, 1, 15, 16, 17, 33])
def test_chunks_change_nothing(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_scores, "CHUNK", 16)
    pred, gt = random_masks(frames, 12, 20, 0), random_masks(frames, 12, 20, 1)
    assert np.array_equal(on_device(pred, gt, 2), packed_bits.frame_counts(pred, gt, 2))


def test_masks_without_pixels_or_foreground() -> None:
    assert not on_device(np.zeros((3, 0, 5), bool), np.zeros((3, 0, 5), bool), 2).any()
    assert not on_device(np.zeros((3, 6, 5), bool), np.zeros((3, 6, 5), bool), 2).any()


def test_any_nonzero_value_is_foreground() -> None:
    pred, gt = random_masks(9, 12, 20, 0), random_masks(9, 12, 20, 1)
    counts = mask_scores.frame_counts(
        torch.from_numpy(pred * np.float32(0.01)), torch.from_numpy(gt * np.uint8(255)), 2
    )
    assert np.array_equal(counts.numpy(), packed_bits.frame_counts(pred, gt, 2))


def test_judging_with_counts_made_before() -> None:
    """Protocols at the original size take the counts; the others, which resize, do not, and score as ever."""
    pred, truth = random_masks(5, 30, 50, 2), random_masks(5, 30, 50, 3)[:, ::-1]
    truth.flags.writeable = False
    scoring = ["davis", "cma-paper", "mevis", "danet-paper"]
    counts = device_counts(scoring, pred, truth, DEVICE)
    assert list(counts) == ["davis", "mevis"]
    assert np.array_equal(counts["davis"], packed_bits.frame_counts(pred, truth, radius(30, 50, 0.008)))
    assert device_counts(["cma-paper"], pred, truth, DEVICE) == {}
    packed = Packed.of(pred), Packed.of(truth)
    assert judge(scoring, *packed, counts=counts) == judge(scoring, *packed)
    # The counts are what is scored, not another look at the masks.
    counts["davis"] = np.tile(np.int64([1, 2, 4, 4, 4, 4]), (5, 1))
    assert judge(["davis"], *packed, counts=counts).scores["davis"]["j"] == [0.5] * 5


def test_shapes_must_agree() -> None:
    masks = random_masks(3, 6, 8, 0)
    with pytest.raises(InputError, match="must have the shape"):
        device_counts(["davis"], masks[:2], masks, DEVICE)
