"""Work on independent parts is done part by part where that spares memory: on a CPU, without gradients.

What lies between the layers of one part then stays in the caches. With gradients all of it would be kept anyway, and a
GPU wants large pieces, so that the whole is one part there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewref.kernels.dispatch import plain

CHUNK = 2048  # tokens that go through a chain of layers together
SMALL = 2**20  # numbers that fit the caches anyway


def whole(x: Tensor) -> bool:
    """Whether work on `x` is better done in one piece."""
    return torch.is_grad_enabled() or x.device.type != "cpu" or x.numel() < SMALL or plain()


def in_chunks(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """function(x, *others), all (B,N,C), which treats every token for itself."""
    if whole(x) or x.shape[1] <= CHUNK:
        return function(x, *others)
    result = None
    for start in range(0, x.shape[1], CHUNK):
        part = function(*(item[:, start : start + CHUNK] for item in (x, *others)))
        if result is None:
            result = part.new_empty(*x.shape[:2], part.shape[2])
        result[:, start : start + CHUNK] = part
    return result


def by_frame(function: Callable[..., Tensor], frames: Sequence[Tensor], clips: Sequence[Tensor] = ()) -> Tensor:
    """function(*frames, *clips), which treats every frame for itself: frames (B*T,...), clips (B,...) ->
    (B*T,N,C) or, the channels last in memory, (B*T,C,h,w)."""
    count = len(frames[0])
    if whole(frames[0]) or count == 1:
        return function(*frames, *clips)
    result = None
    for index in range(count):
        of_clips = (item[index * len(item) // count, None] for item in clips)
        part = function(*(item[index : index + 1] for item in frames), *of_clips)
        if result is None:
            layout = torch.channels_last if part.dim() == 4 else torch.contiguous_format
            result = torch.empty((count, *part.shape[1:]), dtype=part.dtype, memory_format=layout)
        result[index] = part[0]
    return result
