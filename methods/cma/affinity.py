"""Cross-modal affinity: what the query clip takes over from its own middle frame and from the annotated support.

CMA specification 3.5 (hengliusky/Few_shot_RVOS). The three variants differ only in what is fed to the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewref.kernels.affinity import affinity

VARIANTS = ("cma", "self", "base")
BETA = 1.3


class QKV(nn.Module):
    """Three 3x3 convolutions, named as in upstream checkpoints.

    `query` of the support's instance is never evaluated: its result is unused. The parameters exist for the names.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.Key = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.Value = nn.Conv2d(inputs, outputs, 3, padding=1)


@dataclass
class SupportShot:
    """One encoded support clip: fused maps (B,S,C,h,w) at strides 8 to 64 and, per item, masks float (S,H0,W0).

    For the variant "cma" S is 1, the middle frame: no other has an effect.
    """

    maps: list[Tensor]
    masks: list[Tensor]


@dataclass
class SupportFeatures:
    """K encoded shots, possibly of different sizes."""

    shots: list[SupportShot]


@dataclass
class PreparedSupport:
    """A support brought to one size of query maps, `shapes`; reusable for every clip and sentence of that size.

    levels: per level keys and values (B,K*h*w,C/2) and how much of each key is object, (B,K*h*w) in [0,1], for "cma",
    else a 1-tuple of foreground maps (B,S,C,h,w).
    """

    shapes: list[tuple[int, int]]
    levels: list[tuple[Tensor, ...]]


def merge_shots(supports: Sequence[SupportFeatures]) -> SupportFeatures:
    """One support of all shots of `supports`, in their order. More than one shot is an extension of upstream's method:
    "cma" lets the query attend to the pixels of all shots at once, "self" and "base" average their foregrounds."""
    return SupportFeatures([shot for support in supports for shot in support.shots])


def support_transform(x: Tensor, beta: float = BETA) -> Tensor:
    """Element-wise log/power transform of support features, odd up to a constant; float32 of any shape."""
    x = x.float()

    def branch(part: Tensor) -> Tensor:
        return (1 / (part + 1e-5)).log1p().pow(-beta)

    return branch(x.clamp(min=0)) - branch((-x).clamp(min=0))


def foreground(maps: Tensor, masks: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Support maps (B,S,C,h',w') at the size `shape`, times the masks (B tensors (S,H0,W0)) with soft edges."""

    def resize(x: Tensor) -> Tensor:
        return F.interpolate(x, shape, mode="bilinear", align_corners=True)

    return resize(maps.flatten(0, 1)).unflatten(0, maps.shape[:2]) * resize_masks(masks, shape).to(maps)


def resize_masks(masks: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Masks, B tensors (S,H0,W0) of 0/1, at the size `shape`, with soft edges: float (B,S,1,h,w)."""
    resized = [F.interpolate(mask[:, None].float(), shape, mode="bilinear", align_corners=True) for mask in masks]
    return torch.stack(resized)


def tokens(maps: Tensor) -> Tensor:
    """(N,C,h,w) -> (N,h*w,C)."""
    return maps.flatten(2).transpose(1, 2)


def prepare_support(support: SupportFeatures, shapes: list[tuple[int, int]], variant: str, qkv: QKV) -> PreparedSupport:
    """Everything of the support that depends on the size of the query's maps (h,w), but not on the query."""
    levels = []
    for level, shape in enumerate(shapes):
        parts = [foreground(shot.maps[level], shot.masks, shape) for shot in support.shots]
        if variant == "cma":
            frames = [part[:, 0] for part in parts]
            keys = torch.cat([tokens(qkv.Key(frame)) for frame in frames], 1)
            values = torch.cat([tokens(qkv.Value(frame)) for frame in frames], 1)
            share = torch.cat([resize_masks(shot.masks, shape).flatten(1) for shot in support.shots], 1)
            levels.append((keys, values, share))
        else:
            shared = min(part.shape[1] for part in parts)
            levels.append((torch.stack([part[:, :shared] for part in parts]).mean(0),))
    return PreparedSupport(list(shapes), levels)


def foreground_attention(asked: Tensor, keys: Tensor, share: Tensor) -> Tensor:
    """How much of the affinity of each query token (B,N,C) goes to the object in the support: (B,N) in [0,1].

    keys (B,M,C) and share (B,M) as in `PreparedSupport`. Holds the N x M matrix: for training on small frames.
    """
    logits = asked @ keys.transpose(1, 2) / asked.shape[-1] ** 0.5
    return (logits.softmax(-1) @ share[..., None].to(logits)).squeeze(-1)


def rewrite_level(
    query: Tensor,
    support: tuple[Tensor, ...],
    variant: str,
    qkv: QKV,
    conv_q: nn.Module,
    norm: nn.Module,
    drop: nn.Module,
    attention: list[Tensor] | None = None,
) -> Tensor:
    """Features which the transformer gets in place of the fused query maps of one level.

    query (B,T,C,h,w); support: this level of a PreparedSupport. Returns (B,T,C,h,w). attention: a list that is to
    receive the `foreground_attention` of variant "cma", as (B,T,h,w). Raises ValueError where a
    variant that pairs query frames with support frames has fewer support frames than query frames.
    """
    b, t = query.shape[:2]
    if variant == "cma":
        keys, values, _ = support
    else:
        (fore,) = support
        if fore.shape[1] < t:
            raise ValueError(f"variant {variant!r} needs as many support frames as query frames: {fore.shape[1]} < {t}")
        fore = fore[:, :t]
        if variant == "base":
            return query + fore

    h, w = query.shape[3:]
    middle = query[:, t // 2]
    asked = tokens(qkv.query(query.flatten(0, 1))).unflatten(0, (b, t)).flatten(1, 2)  # (B,T*h*w,C/2)
    x = norm(asked + drop(affinity(asked, tokens(qkv.Key(middle)), tokens(qkv.Value(middle)))))
    if variant == "cma":
        if attention is not None:
            attention.append(foreground_attention(x, keys, support[2]).unflatten(1, (t, h, w)))
        x = norm(x + drop(affinity(x, keys, values)))
    kept = tokens(conv_q((query if variant == "cma" else fore).flatten(0, 1))).unflatten(0, (b, t))
    rewritten = torch.cat((x.unflatten(1, (t, h * w)), kept.to(x.dtype)), dim=-1)  # the channels last, as convolutions
    return rewritten.unflatten(2, (h, w)).permute(0, 1, 4, 2, 3)  # and the encoder want them
