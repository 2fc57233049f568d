"""Annotated clips as one batch of tensors, for training and for adaptation to a support set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewref.episodes.transforms import ClipSample, normalised_boxes

MULTIPLE = 32  # sides of a padded clip


@dataclass(frozen=True)
class Batch:
    """B annotated clips, each with a support clip or none with any.

    Frames are uint8 (B,T,3,H,W) and padded bottom right; padding bool (B,T,H,W) is true there. sizes: int64 (B,2)
    unpadded (H, W); ids, attention: int64 (B,L); targets: per clip boxes (T,4), masks (T,H,W), valid (T,);
    support_masks: per support clip float (S,H0,W0), unpadded. tracking: per frame another one of its video with all but
    the object black, padded to a size of its own, with tracking_padding; for methods that track.
    """

    frames: Tensor
    padding: Tensor
    sizes: Tensor
    ids: Tensor
    attention: Tensor
    targets: list[dict[str, Tensor]]
    support_frames: Tensor | None = None
    support_padding: Tensor | None = None
    support_masks: list[Tensor] | None = None
    support_ids: Tensor | None = None
    support_attention: Tensor | None = None
    tracking: Tensor | None = None
    tracking_padding: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""

        def move(value: object) -> object:
            if isinstance(value, list):
                return [move(part) for part in value]
            if isinstance(value, dict):
                return {name: move(part) for name, part in value.items()}
            return None if value is None else value.to(device, non_blocking=True)

        return Batch(**{name: move(value) for name, value in vars(self).items()})


def collate(episodes: Sequence[tuple[ClipSample, ...]], tokenizer: Callable) -> Batch:
    """One batch from (query, support) pairs or from (query,) alone; tokenizer: sentences -> ids, attention."""
    queries, *supports = zip(*episodes, strict=True)
    frames, padding = pad(queries)
    ids, attention = tokenizer([sample.text for sample in queries])
    return Batch(
        frames=frames,
        padding=padding,
        sizes=torch.tensor([sample.size for sample in queries]),
        ids=ids,
        attention=attention,
        targets=[
            {
                "boxes": torch.from_numpy(normalised_boxes(sample)),
                "masks": torch.from_numpy(np.ascontiguousarray(sample.masks)),
                "valid": torch.from_numpy(sample.valid),
            }
            for sample in queries
        ],
        **(_support(supports[0], tokenizer) if supports else {}),
    )


def with_tracking(batch: Batch, samples: Sequence[ClipSample]) -> Batch:
    """The batch with the tracking images of its clips, given in the same order."""
    frames, padding = pad(samples)
    return replace(batch, tracking=frames, tracking_padding=padding)


def _support(samples: Sequence[ClipSample], tokenizer: Callable) -> dict[str, Any]:
    frames, padding = pad(samples)
    ids, attention = tokenizer([sample.text for sample in samples])
    return {
        "support_frames": frames,
        "support_padding": padding,
        "support_masks": [torch.from_numpy(sample.masks.astype(np.float32)) for sample in samples],
        "support_ids": ids,
        "support_attention": attention,
    }


def pad(samples: Sequence[ClipSample]) -> tuple[Tensor, Tensor]:
    """Frames uint8 (B,T,3,H,W), top left in sides that are multiples of 32, and padding bool (B,T,H,W)."""
    height, width = (-(-max(sides) // MULTIPLE) * MULTIPLE for sides in zip(*(s.size for s in samples), strict=True))
    count = len(samples[0].frames)
    frames = np.zeros((len(samples), count, 3, height, width), np.uint8)
    padding = np.ones((len(samples), count, height, width), bool)
    for clip, sample in enumerate(samples):
        frames[clip, :, :, : sample.size[0], : sample.size[1]] = sample.frames.transpose(0, 3, 1, 2)
        padding[clip, :, : sample.size[0], : sample.size[1]] = False
    return torch.from_numpy(frames), torch.from_numpy(padding)
