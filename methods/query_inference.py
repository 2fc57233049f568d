"""From frames to mask logits, as ReferFormer and CMA test: short side resized, frames in windows, a query for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.query_net import QueryMaps, QueryNet
from fewref.methods.text import TextFeatures

Ask = Callable[[QueryMaps, Tensor], dict]  # encoded windows (B) and their sizes, int (B,2), to the network's outputs


class Chosen(NamedTuple):
    """Of one window: mask logits float32 (T,h,w) of the chosen query, its index, and the scores float32 (Q,) of all."""

    logits: Tensor
    query: int
    scores: Tensor


@dataclass
class ClipAnswer:
    """What the network says of a clip: logits float32 (T,h,w) of the chosen queries at stride 4; size: (H,W) of the
    network's input; per window the chosen query and the mean probability of each query, scores float32 (windows,Q)."""

    logits: Tensor
    size: tuple[int, int]
    queries: list[int]
    scores: Tensor

    @property
    def confidence(self) -> float:
        """Mean over the windows of the chosen query's probability, in [0,1]."""
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


def probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask logits (T,h,w) -> probabilities float32 (T,H,W) at `size`, enlarged bilinearly before the sigmoid."""
    return resize(logits.float(), size).sigmoid()


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Float maps (T,h,w) brought to another size, bilinearly."""
    return F.interpolate(x[:, None], size, mode="bilinear", align_corners=False)[:, 0]


@torch.inference_mode()
def answer_clip(
    net: QueryNet, frames: np.ndarray, asks: Sequence[Ask], *, chunk: int = 10, short_side: int = 360, batch: int = 1
) -> list[ClipAnswer]:
    """Segment what each of several sentences names in one clip: frames uint8 (T,3,H,W).

    The frames are cut into windows of `chunk`, the last one shorter, and each is answered on its own. A window is
    encoded once; then one sentence is asked after the other, so that each gets the answer, bit for bit, that it gets
    alone. batch: full windows that go through the network together, which changes answers by float rounding alone. Only
    the chosen masks are kept: beside them, memory does not grow with the clip. The network must be in eval mode.
    """
    found: list[list[Chosen]] = [[] for _ in asks]
    for part, count in cut_windows(len(frames), chunk, batch):
        answers, size = _answer_windows(net, resize_short_side(frames[part], short_side), count, asks)
        for windows, chosen in zip(found, answers, strict=True):
            windows += chosen
    return [
        ClipAnswer(
            torch.cat([window.logits for window in windows]),
            size,
            [window.query for window in windows],
            torch.stack([window.scores for window in windows]),
        )
        for windows in found
    ]


def cut_windows(frames: int, chunk: int, batch: int = 1) -> Iterator[tuple[slice, int]]:
    """Which frames go through the network together, and as how many windows of equal length."""
    whole = frames // chunk
    for first in range(0, whole, batch):
        count = min(batch, whole - first)
        yield slice(first * chunk, (first + count) * chunk), count
    if frames % chunk:
        yield slice(whole * chunk, frames), 1


def _answer_windows(
    net: QueryNet, frames: np.ndarray, count: int, asks: Sequence[Ask]
) -> tuple[list[list[Chosen]], tuple[int, int]]:
    """Answers per sentence and window, and the input size: frames uint8 (T,3,H,W) at that size, of `count` windows.

    Nothing else of the windows stays in memory.
    """
    size = frames.shape[-2:]
    clips = normalise(torch.tensor(frames, device=next(net.parameters()).device)).unflatten(0, (count, -1))
    maps = net.encode_query(clips, torch.zeros(clips.shape[:2] + size, dtype=torch.bool, device=clips.device))
    net.share(maps)
    sizes = torch.tensor([size] * count, device=clips.device)
    return [choose(ask(maps, sizes)) for ask in asks], size


def choose(output: dict) -> list[Chosen]:
    """The answer to each of B windows among the network's outputs for them, in memory of its own."""
    windows = zip(output["pred_masks"], output["chosen"].tolist(), output["scores"], strict=True)
    return [Chosen(masks.to(torch.float32, copy=True), query, scores) for masks, query, scores in windows]


def repeat_text(text: TextFeatures, count: int) -> TextFeatures:
    """The features of one sentence (B = 1) for `count` windows; no copy."""
    return TextFeatures(*(item.expand(count, *item.shape[1:]) for item in (text.words, text.word_mask, text.sentence)))
