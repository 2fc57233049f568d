"""Pixel decoder: a feature pyramid whose every stage looks at the clip and at the words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fewref.methods.layers.attention import Attention
from fewref.methods.layers.mlp import Linear, feed_forward, xavier_matrices
from fewref.methods.layers.piecewise import by_frame

REDUCTIONS = {1: 8, 2: 4, 3: 2, 4: 1}  # stage (1 = stride 4 ... 4 = stride 32) -> spatial reduction of self attention


class VisionLanguageBlock(nn.Module):
    """Self attention over all pixels of a clip (at a reduced size), cross attention to the words, feed-forward part."""

    def __init__(self, channels: int, heads: int, ffn: int, reduction: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads, dropout)
        self.multihead_attn = Attention(channels, heads, dropout)
        self.linear1 = Linear(channels, ffn)
        self.linear2 = Linear(ffn, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.reduction = reduction

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, words: Tensor, word_positions: Tensor, word_mask: Tensor
    ) -> Tensor:
        """x and positions (B*T,C,h,w), mask bool (B*T,h,w) True on padding, words and word_positions (B,L,C),
        word_mask bool (B,L) -> (B*T,C,h,w)."""
        return self.read(self.look_around(x, positions, mask, len(words)), positions, words, word_positions, word_mask)

    def look_around(self, x: Tensor, positions: Tensor, mask: Tensor, batch: int) -> Tensor:
        """The part before the words: self attention of every pixel to every pixel of its clip, of which there are
        `batch`, at 1/reduction of the size, with residual and norm; as `forward`."""
        h, w = x.shape[2:]
        small = (max(1, h // self.reduction), max(1, w // self.reduction))
        coarse, placed = x, positions
        if self.reduction > 1:
            coarse, placed = F.interpolate(x, small), F.interpolate(positions, small)
            mask = F.interpolate(mask[:, None].float(), small)[:, 0].bool()
        coarse, placed = _tokens(coarse, batch), _tokens(coarse + placed, batch)
        found = self.self_attn(placed, placed, coarse, mask.reshape(batch, -1))

        def add(x: Tensor, found: Tensor) -> Tensor:
            if self.reduction > 1:
                found = F.interpolate(found, (h, w), mode="bilinear", align_corners=False)
            return _maps(self.norm1(_tokens(x) + self.dropout(_tokens(found))), h, w)

        return by_frame(add, (x, _maps(found, *small)))

    def read(self, x: Tensor, positions: Tensor, words: Tensor, word_positions: Tensor, word_mask: Tensor) -> Tensor:
        """The rest, which treats every pixel for itself; x as `look_around` gives it, all else as for `forward`."""
        batch = len(words)
        tokens = _tokens(x, batch)
        found = self.multihead_attn(tokens + _tokens(positions, batch), words + word_positions, words, word_mask)
        tokens = self.norm2(tokens + self.dropout(found))
        hidden = feed_forward(tokens, self.linear1, self.linear2, self.dropout)
        return _maps(self.norm3(tokens + self.dropout(hidden)), *x.shape[2:])


def _tokens(maps: Tensor, batch: int | None = None) -> Tensor:
    """(N,C,h,w) -> (N,h*w,C), or the frames of each of `batch` clips behind one another, (B,T*h*w,C)."""
    tokens = maps.permute(0, 2, 3, 1)
    return tokens.flatten(1, 2) if batch is None else tokens.reshape(batch, -1, maps.shape[1])


def _maps(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B,T*h*w,C) -> (B*T,C,h,w)."""
    return tokens.reshape(-1, h, w, tokens.shape[-1]).permute(0, 3, 1, 2)


class ConvNorm(nn.Conv2d):
    """Convolution without bias and group norm of 8 groups, then ReLU where wanted."""

    def __init__(self, inputs: int, outputs: int, kernel: int, relu: bool) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_uniform_(self.weight, a=1)
        self.norm = nn.GroupNorm(8, outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(super().forward(x))
        return x.relu_() if self.relu else x


class CrossModalFPN(nn.Module):
    """From strides 32, 16 and 8 (encoder memory) and 4 (raw backbone map) to mask features at stride 4.

    Source: ReferFormer (wjn922/ReferFormer), CMA specification 3.8.
    """

    def __init__(
        self,
        inputs: tuple[int, int, int, int],
        channels: int = 256,
        outputs: int = 256,
        heads: int = 8,
        ffn: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        """inputs: channels of the maps at strides 4, 8, 16 and 32."""
        super().__init__()
        for stage, width in enumerate(inputs, start=1):
            self.add_module(f"adapter_{stage}", ConvNorm(width, channels, 1, relu=False))
            self.add_module(f"layer_{stage}", ConvNorm(channels, channels, 3, relu=True))
        self.mask_features = nn.Conv2d(channels, outputs, 3, padding=1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)
        for stage, reduction in REDUCTIONS.items():
            block = VisionLanguageBlock(channels, heads, ffn, reduction, dropout)
            xavier_matrices(block)
            self.add_module(f"cross_attn_{stage}", block)

    def forward(self, *inputs: object) -> Tensor:
        """Mask features (B*T,outputs,h,w) at stride 4; arguments as of `pyramid`."""
        return self.mask_features(self.pyramid(*inputs))

    def pyramid(
        self,
        maps: list[Tensor],
        masks: list[Tensor],
        positions: list[Tensor],
        words: Tensor,
        word_positions: Tensor,
        word_mask: Tensor,
        finest: Tensor | None = None,
        finish: Callable[..., Tensor] | None = None,
        given: Sequence[Tensor] = (),
    ) -> Tensor:
        """maps (B*T,C_s,h,w), masks bool (B*T,h,w) and positions (B*T,C,h,w) at strides 4, 8, 16, 32; words and
        word_positions (B,L,C), word_mask bool (B,L). finest: what `look_around` gave of the first map, if it did.
        Returns maps (B*T,C,h,w) at stride 4, of which `mask_features` is the last layer; or, without ever holding
        these, finish(maps, *given) (B*T,C',h,w), which treats every frame for itself, given (B*T,...)."""
        y = None
        for stage in (4, 3, 2, 1):
            if stage > 1 or finest is None:
                x = self.look_around(stage, maps[stage - 1], masks[stage - 1], positions[stage - 1], len(words))
            else:
                x = finest
            frames = [x, positions[stage - 1]] + ([] if y is None else [y]) + (list(given) if stage == 1 else [])
            run = self._stage(stage, finish if stage == 1 else None)
            y = by_frame(run, frames, (words, word_positions, word_mask))
        return y

    def _stage(self, stage: int, finish: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        """What a stage does with the words: x and positions (N,C,h,w), unless it is the first the map of the stage
        below, what `finish` is given, and the words of each clip -> (N,C,h,w)."""
        block, layer = getattr(self, f"cross_attn_{stage}"), getattr(self, f"layer_{stage}")

        def run(x: Tensor, positions: Tensor, *rest: Tensor) -> Tensor:
            *others, words, word_positions, word_mask = rest
            x = block.read(x, positions, words, word_positions, word_mask)
            if stage < 4:
                below, *others = others
                x = x + F.interpolate(below, x.shape[-2:])
            return layer(x) if finish is None else finish(layer(x), *others)

        return run

    def look_around(self, stage: int, x: Tensor, mask: Tensor, positions: Tensor, batch: int) -> Tensor:
        """What a stage makes of its map before it sees the words: (B*T,C_s,h,w) -> (B*T,C,h,w).

        That of stage 1, whose map no sentence has touched, serves all sentences of a clip.
        """
        x = by_frame(getattr(self, f"adapter_{stage}"), (x,))
        return getattr(self, f"cross_attn_{stage}").look_around(x, positions, mask, batch)
