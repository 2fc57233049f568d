"""From frames to masks as CMA's authors test: short side resized, chunks of frames, one query chosen per chunk.

CMA specification 8. Masks are cut twice, at the network's input size and at the original size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewref.methods.cma.affinity import PreparedSupport, SupportFeatures
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.pixels import normalise
from fewref.methods.text import TextFeatures


@dataclass
class ClipAnswer:
    """What the network says of a clip: prob float32 (T,H,W) at the input size; per chunk the chosen query and the
    mean probability of each query, scores float32 (chunks,Q)."""

    prob: Tensor
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
    return _resize(logits.float(), size).sigmoid()


def masks_at_input(prob: Tensor) -> Tensor:
    """bool (T,H,W): the masks which are scored at the input size, prob > 0.5."""
    return prob > 0.5


def truth_at_input(truth: Tensor, size: tuple[int, int]) -> Tensor:
    """Truth (T,H0,W0), 0/1 -> bool (T,H,W) at the input size, as masks at the input size are judged."""
    return _resize(truth.float(), size) > 0.5


def masks_at(prob: Tensor, size: tuple[int, int]) -> Tensor:
    """bool (T,H0,W0): the masks at the original size, probabilities resized bilinearly and >= 0.5."""
    return _resize(prob, size) >= 0.5


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x[:, None], size, mode="bilinear", align_corners=False)[:, 0]


@torch.inference_mode()
def encode_shot(
    net: CMANet, frames: np.ndarray, masks: np.ndarray, text: TextFeatures, short_side: int
) -> SupportFeatures:
    """One support clip: frames uint8 (S,3,H,W), masks bool (S,H,W) at the original size, text of its sentence (B=1)."""
    device = next(net.parameters()).device
    frames = normalise(torch.tensor(resize_short_side(frames, short_side), device=device))[None]
    padding = torch.zeros(1, len(masks), *frames.shape[-2:], dtype=torch.bool, device=device)
    return net.encode_support(frames, padding, torch.tensor(masks, device=device).float()[None], text)


@torch.inference_mode()
def answer_clip(
    net: CMANet,
    frames: np.ndarray,
    text: TextFeatures,
    support: SupportFeatures,
    *,
    prepared: dict[tuple, PreparedSupport] | None = None,
    chunk: int = 10,
    short_side: int = 360,
) -> ClipAnswer:
    """Segment what the sentence names in every frame: frames uint8 (T,3,H,W), text of one sentence (B=1).

    The frames are cut into chunks of `chunk`, the last one shorter; each is answered on its own under the same
    support. The network must be in eval mode. prepared: a dictionary to keep what of the support depends only on the
    size of the maps, for further calls with the same network and support.
    """
    device = next(net.parameters()).device
    frames = resize_short_side(frames, short_side)
    size = frames.shape[-2:]
    sizes = torch.tensor([size], device=device)
    prepared = {} if prepared is None else prepared
    probs, queries, scores = [], [], []
    for start in range(0, len(frames), chunk):
        part = normalise(torch.tensor(frames[start : start + chunk], device=device))[None]
        maps = net.encode_query(part, torch.zeros(part.shape[:2] + size, dtype=torch.bool, device=device))
        key = tuple(maps.shapes)
        if key not in prepared:
            prepared[key] = net.prepare_support(support, maps.shapes)
        output = net(maps, None, sizes, text, prepared[key], auxiliary=False)
        query, score = select_query(output["pred_logits"][0])
        probs.append(probabilities(output["pred_masks"][0, :, query], size))
        queries.append(query)
        scores.append(score)
    return ClipAnswer(torch.cat(probs), queries, torch.stack(scores))
