"""The controls: answers that know nothing, or everything, and so show what a score is worth."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from fewref.episodes.types import Prediction, Query, SupportSet
from fewref.methods.base import Method, MethodInfo


def _size(query: Query) -> tuple[int, int, int]:
    frames, _, height, width = query.frames.shape
    return frames, height, width


class Empty(Method):
    """Nothing, in every frame."""

    info = MethodInfo("empty", "predicts nothing", kind="control", uses_text=False, uses_support=False)

    def adapt(self, support: SupportSet) -> None:
        """Nothing to take in."""

    def predict(self, query: Query) -> Prediction:
        """Empty masks, confidence 0."""
        return Prediction(query.id, np.zeros(_size(query), dtype=bool), confidence=0.0)


class Random(Method):
    """One ellipse that stands still.

    Centre uniform in the frame, half-axes uniform in 5..40 % of the shorter side, any angle; the draw depends on the
    seed and the query's id alone.
    """

    info = MethodInfo(
        "random", "one ellipse of random place and size", kind="control", uses_text=False, uses_support=False
    )

    def adapt(self, support: SupportSet) -> None:
        """Nothing to take in."""

    def predict(self, query: Query) -> Prediction:
        """The same ellipse in every frame, confidence 0.5."""
        frames, height, width = _size(query)
        digest = hashlib.sha256(f"random/{self.seed}/{query.id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
        axes = rng.uniform(0.05, 0.4, size=2) * min(height, width)
        angle = rng.uniform(0, np.pi)
        y, x = np.mgrid[:height, :width] + 0.5
        along = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
        across = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
        ellipse = (along / axes[0]) ** 2 + (across / axes[1]) ** 2 <= 1
        return Prediction(query.id, np.repeat(ellipse[None], frames, axis=0), confidence=0.5)


class CopySupport(Method):
    """The mean support mask, put over every query frame.

    The masks of all shots and frames are resized (PIL bilinear) to the query's size and averaged; where the mean
    exceeds 0.5 is foreground. If that is nowhere, the pixels with the highest mean are taken instead, as many as a
    support mask has on average (share of the image), ties in reading order. Without any support foreground: empty.
    """

    info = MethodInfo("copy-support", "mean support mask, pasted on every frame", kind="control", uses_text=False)

    def adapt(self, support: SupportSet) -> None:
        """Keep, per shot, the mean mask over its frames, float32 (H,W), and the number of frames."""
        self._means = [(shot.masks.mean(axis=0, dtype=np.float32), len(shot.masks)) for shot in support.shots]

    def predict(self, query: Query) -> Prediction:
        """The thresholded mean mask in every frame, confidence the mean's highest value."""
        frames, height, width = _size(query)
        total = sum(count for _, count in self._means)
        mean = np.zeros((height, width))
        for shot, count in self._means:
            resized = Image.fromarray(shot).resize((width, height), Image.Resampling.BILINEAR)
            mean += np.asarray(resized, dtype=np.float64) * (count / total)
        mask = mean > 0.5
        if not mask.any():
            share = sum(float(shot.mean(dtype=np.float64)) * count for shot, count in self._means) / total
            highest = np.argsort(-mean, axis=None, kind="stable")[: round(share * mean.size)]
            mask.flat[highest] = True
        confidence = float(np.clip(mean.max(), 0, 1))
        return Prediction(query.id, np.repeat(mask[None], frames, axis=0), confidence)


class Oracle(Method):
    """The truth itself: the upper end of the scale and a test of the scorer."""

    info = MethodInfo(
        "oracle", "the ground truth", kind="control", sees_truth=True, uses_text=False, uses_support=False
    )

    def adapt(self, support: SupportSet) -> None:
        """Nothing to take in."""

    def reveal(self, masks: np.ndarray) -> None:
        """Keep the truth of the next query, bool (T,H,W)."""
        self._truth = np.array(masks, dtype=bool)

    def predict(self, query: Query) -> Prediction:
        """What `reveal` showed."""
        return Prediction(query.id, self._truth.copy(), confidence=1.0)
