"""From frames to masks: bootstrap, key frame, tracking (TF2 specification, sections 4 and 5).

What of a clip does not depend on a tracking image - backbone, fusion with the sentence, encoder - is computed once and
serves the bootstrap and the tracking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.query_net import QueryMaps
from fewref.methods.query_inference import probabilities, resize_short_side
from fewref.methods.text import TextFeatures
from fewref.methods.tf2.net import Stream, TF2Net
from fewref.methods.tf2.tracking import key_frame, track


@dataclass
class TrackedClip:
    """A clip in the making: logits float32 (T,h,w) of the chosen queries at stride 4, and their scores (T,) in [0,1];
    size: (H,W) of the network's input; key: the key frame."""

    logits: Tensor
    scores: Tensor
    size: tuple[int, int]
    key: int

    @property
    def confidence(self) -> float:
        """Mean over the frames of the chosen query's probability, in [0,1]."""
        return float(self.scores.mean())


@dataclass
class FrameTracker:
    """Answers for one frame at a time, as `track` asks; `answer` keeps what it finds.

    frames: uint8 (T,3,H,W) at the original size; streams: one per frame; text of one sentence (B = 1).
    """

    net: TF2Net
    frames: np.ndarray
    streams: Mapping[int, Stream] | list[Stream]
    text: TextFeatures
    short_side: int
    answer: TrackedClip

    @torch.inference_mode()
    def __call__(self, frame: int, last: int, image: np.ndarray) -> np.ndarray:
        """Mask bool (H,W) of a frame, given the tracking image uint8 (3,H,W) of frame `last`."""
        tracking = encode(self.net, resize_short_side(image[None], self.short_side), self.text)
        output = self.net.decode(self.streams[frame], self._sizes(), self.text, tracking, chosen=True)
        logits = output["pred_masks"][0].float()
        self.answer.logits[frame], self.answer.scores[frame] = logits[0], output["scores"].max()
        return cut(logits, self.frames.shape[-2:])[0]

    def _sizes(self) -> Tensor:
        return torch.tensor([self.answer.size], device=self.answer.logits.device)


@torch.inference_mode()
def answer_clip(
    net: TF2Net, frames: np.ndarray, text: TextFeatures, *, mode: str = "full", chunk: int = 10, short_side: int = 360
) -> TrackedClip:
    """Segment what the sentence names in every frame: frames uint8 (T,3,H,W), text of one sentence (B = 1).

    The bootstrap, which upstream leaves open, is ours: the same weights without a tracking image, that is ReferFormer,
    in chunks of `chunk` frames; its surest frame is the key frame. mode: see `MODES`. The network must be in eval mode.
    Memory grows with the clip: features of all frames are held, about 25 MB per frame at upstream's size.
    """
    resized = resize_short_side(frames, short_side)
    answer, streams = bootstrap(net, resized, text, chunk)
    masks = cut(answer.logits, frames.shape[-2:])
    track(frames, masks, answer.key, FrameTracker(net, frames, streams, text, short_side, answer), mode)
    return answer


@torch.inference_mode()
def bootstrap(net: TF2Net, frames: np.ndarray, text: TextFeatures, chunk: int) -> tuple[TrackedClip, list[Stream]]:
    """ReferFormer's answer for frames uint8 (T,3,H,W) at the input size, and a stream of each frame for itself."""
    size = frames.shape[-2:]
    sizes = torch.tensor([size], device=text.words.device)
    logits, scores, streams = [], [], []
    for start in range(0, len(frames), chunk):
        stream = encode(net, frames[start : start + chunk], text)
        output = net.decode(stream, sizes, text, None, chosen=True)
        query = output["chosen"][0]
        logits.append(output["pred_masks"][0].float())
        scores.append(output["pred_logits"][0, :, query].sigmoid().amax(-1))
        streams.extend(split(stream))
    found = torch.cat(scores)
    return TrackedClip(torch.cat(logits), found, size, key_frame(found.tolist())), streams


def encode(net: TF2Net, frames: np.ndarray, text: TextFeatures) -> Stream:
    """The stream (B = 1) of frames or tracking images uint8 (T,3,H,W) at the input size, none of it padded."""
    clip = normalise(torch.tensor(frames, device=text.words.device))[None]
    padding = torch.zeros(1, len(frames), *frames.shape[-2:], dtype=torch.bool, device=clip.device)
    return net.encode_stream(clip, padding, text)


def split(stream: Stream) -> Iterator[Stream]:
    """A stream of one unpadded clip as streams of its single frames, which share masks and positions."""
    maps, memory = stream.maps, stream.memory
    masks, positions = ([item[:1].clone() for item in items] for items in (maps.masks, maps.positions))
    for index in range(len(maps.stride4)):
        at = slice(index, index + 1)
        frame = QueryMaps(maps.stride4[at], [item[:, at] for item in maps.projected], masks, positions)
        held = memory._replace(tokens=memory.tokens[at], padding=memory.padding[at])
        yield Stream(frame, held, stream.valid_ratios[at])


def cut(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Mask logits (T,h,w) -> bool (T,H,W) at `size`: probability above 0.5."""
    return (probabilities(logits, size) > 0.5).cpu().numpy()
