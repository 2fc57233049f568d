"""From frames to mask logits, as ReferFormer and CMA test: short side resized, frames in chunks, a query per chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.query_net import QueryMaps, QueryNet


@dataclass
class ClipAnswer:
    """What the network says of a clip: logits float32 (T,h,w) of the chosen queries at stride 4; size: (H,W) of the
    network's input; per chunk the chosen query and the mean probability of each query, scores float32 (chunks,Q)."""

    logits: Tensor
    size: tuple[int, int]
    queries: list[int]
    scores: Tensor

    @property
    def confidence(self) -> float:
        """Mean over the chunks of the chosen query's probability, in [0,1]."""
        return float(self.scores.amax(1).mean())


def resize_short_side(frames: np.ndarray, short_side: int) -> np.ndarray:
    """uint8 (T,3,H,W) -> uint8 (T,3,h,w) with min(h,w) = short_side; antialiased bilinear of PIL.

    The long side is int(short_side * long / short), without an upper limit, as torchvision resizes PIL images.
    """
    height, width = frames.shape[-2:]
    long_side = int(short_side * max(height, width) / min(height, width))
    size = (short_side, long_side) if width <= height else (long_side, short_side)
    if size == (width, height):
        return frames
    images = (Image.fromarray(frame.transpose(1, 2, 0)) for frame in frames)
    return np.stack([np.asarray(image.resize(size, Image.Resampling.BILINEAR)).transpose(2, 0, 1) for image in images])


def select_query(logits: Tensor) -> tuple[int, Tensor]:
    """Which query answers a chunk: logits (T,Q,1) -> its index, and the mean probability over the frames, (Q,)."""
    scores = logits.float().sigmoid().mean(0).amax(-1)
    return int(scores.argmax()), scores


def probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (T,h,w) -> probabilities float32 (T,H,W) at `size`, enlarged bilinearly before the sigmoid."""
    return resize(logits.float(), size).sigmoid()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Float maps (T,h,w) brought to another size, bilinearly."""
    return F.interpolate(x[:, None], size, mode="bilinear", align_corners=False)[:, 0]


@torch.inference_mode()
def answer_clip(
    net: QueryNet,
    frames: np.ndarray,
    ask: Callable[[QueryMaps, Tensor], dict],
    *,
    chunk: int = 10,
    short_side: int = 360,
) -> ClipAnswer:
    """Segment one clip: frames uint8 (T,3,H,W).

    The frames are cut into chunks of `chunk`, the last one shorter, and each is answered on its own. ask: encoded
    chunk (B = 1) and its size, int (1,2), to the network's outputs. The network must be in eval mode.
    """
    device = next(net.parameters()).device
    frames = resize_short_side(frames, short_side)
    size = frames.shape[-2:]
    sizes = torch.tensor([size], device=device)
    logits, queries, scores = [], [], []
    for start in range(0, len(frames), chunk):
        part = normalise(torch.tensor(frames[start : start + chunk], device=device))[None]
        maps = net.encode_query(part, torch.zeros(part.shape[:2] + size, dtype=torch.bool, device=device))
        output = ask(maps, sizes)
        query, score = select_query(output["pred_logits"][0])
        logits.append(output["pred_masks"][0, :, query].float())
        queries.append(query)
        scores.append(score)
    return ClipAnswer(torch.cat(logits), size, queries, torch.stack(scores))
