"""What is CMA's own from frames to masks: the support clip, and masks cut at the input size and at the original size.

CMA specification 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fewref.methods.cma.affinity import PreparedSupport, SupportFeatures
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.query_net import QueryMaps
from fewref.methods.query_inference import (
    ClipAnswer,
    answer_clip,
    probabilities,
    repeat_text,
    resize,
    resize_short_side,
)
from fewref.methods.text import TextFeatures


def masks_at_input(prob: Tensor) -> Tensor:
    """bool (T,H,W): the masks which are scored at the input size, prob > 0.5."""
    return prob > 0.5


def truth_at_input(truth: Tensor, size: tuple[int, int]) -> Tensor:
    """Truth (T,H0,W0), 0/1 -> bool (T,H,W) at the input size, as masks at the input size are judged."""
    return resize(truth.float(), size) > 0.5


def masks_at(prob: Tensor, size: tuple[int, int]) -> Tensor:
    """bool (T,H0,W0): the masks at the original size, probabilities resized bilinearly and >= 0.5."""
    return resize(prob, size) >= 0.5


def input_probabilities(answer: ClipAnswer) -> Tensor:
    """float32 (T,H,W) at the network's input size."""
    return probabilities(answer.logits, answer.size)


def encode_shot(
    net: CMANet, frames: np.ndarray, masks: np.ndarray, text: TextFeatures, short_side: int
) -> SupportFeatures:
    """One support clip: frames uint8 (S,3,H,W), masks bool (S,H,W) at the original size, text of its sentence (B=1)."""
    device = next(net.parameters()).device
    frames = normalise(torch.tensor(resize_short_side(frames, short_side), device=device))[None]
    padding = torch.zeros(1, len(masks), *frames.shape[-2:], dtype=torch.bool, device=device)
    return net.encode_support(frames, padding, torch.tensor(masks, device=device).float()[None], text)


def answer_queries(
    net: CMANet,
    frames: np.ndarray,
    texts: Sequence[TextFeatures],
    support: SupportFeatures,
    *,
    prepared: dict[tuple, PreparedSupport] | None = None,
    chunk: int = 10,
    short_side: int = 360,
    batch: int = 1,
) -> list[ClipAnswer]:
    """Segment what each sentence names in every frame: frames uint8 (T,3,H,W), texts of one sentence (B=1) each.

    As `answer_clip`, each window under the same support. prepared: a dictionary to keep what of the support depends
    only on the size of the maps, for further calls with the same network and support.
    """
    prepared = {} if prepared is None else prepared

    def ask(text: TextFeatures, maps: QueryMaps, sizes: Tensor) -> dict:
        key = tuple(maps.shapes)
        if key not in prepared:
            prepared[key] = net.prepare_support(support, maps.shapes)
        shown = repeat_support(prepared[key], len(sizes))
        return net(maps, None, sizes, repeat_text(text, len(sizes)), shown, chosen=True)

    asks = [partial(ask, text) for text in texts]
    return answer_clip(net, frames, asks, chunk=chunk, short_side=short_side, batch=batch)


def repeat_support(support: PreparedSupport, count: int) -> PreparedSupport:
    """One prepared support (B = 1) for `count` windows; no copy."""
    levels = [tuple(item.expand(count, *item.shape[1:]) for item in level) for level in support.levels]
    return PreparedSupport(support.shapes, levels)
