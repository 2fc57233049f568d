"""Photometric distortion of one frame: brightness, contrast, saturation, hue and channel order."""

from __future__ import annotations

import numpy as np

BRIGHTNESS = 32.0  # grey levels
FACTORS = (0.5, 1.5)  # of contrast and saturation
HUE = 18.0  # degrees
TINY = np.float32(np.finfo(np.float32).eps)


def distort(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distort a frame, uint8 (H,W,3) RGB in and out; each step is applied with probability one half.

    Values are not clipped: what leaves 0..255 wraps round, as in the training of `hengliusky/Few_shot_RVOS`
    (specification of CMA, section 7).
    """
    image = frame.astype(np.float32)
    if rng.random() < 0.5:
        image = image + np.float32(rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = rng.random() < 0.5
    if contrast_first:
        image = _contrast(image, rng)
    image = _colour(image, rng)
    if not contrast_first:
        image = _contrast(image, rng)
    if rng.random() < 0.5:
        image = image[..., rng.permutation(3)]
    # Through a signed integer: the cast of a negative float to uint8 differs between processors.
    return image.astype(np.int32).astype(np.uint8)


def _contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image * np.float32(rng.uniform(*FACTORS)) if rng.random() < 0.5 else image


def _colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    saturation = rng.uniform(*FACTORS) if rng.random() < 0.5 else 1.0
    shift = rng.uniform(-HUE, HUE) if rng.random() < 0.5 else 0.0
    if saturation == 1.0 and shift == 0.0:
        return image
    hue, amount, value = rgb_to_hsv(image)
    return hsv_to_rgb((hue + np.float32(shift)) % 360, amount * np.float32(saturation), value)


def rgb_to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float32 RGB (H,W,3) of any scale -> hue in degrees [0,360), saturation, value (the largest channel), each (H,W).

    As OpenCV does for floating point images.
    """
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = image.max(-1)
    spread = value - image.min(-1)
    turn = np.float32(60) / (spread + TINY)
    hue = np.where(
        value == red,
        (green - blue) * turn,
        np.where(value == green, (blue - red) * turn + 120, (red - green) * turn + 240),
    )
    return np.where(hue < 0, hue + 360, hue), spread / (np.abs(value) + TINY), value


def hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The inverse of `rgb_to_hsv`: float32 (H,W,3)."""
    sector = np.mod(hue / np.float32(60), 6)
    # Channel n is the value less chroma times a trapezoid of the hue, shifted by 5, 3 and 1 sectors for R, G and B.
    shifts = np.array([5, 3, 1], np.float32)
    k = np.mod(sector[..., None] + shifts, 6)
    ramp = np.minimum(k, 4 - k).clip(0, 1)
    return (value[..., None] * (1 - saturation[..., None] * ramp)).astype(np.float32)
