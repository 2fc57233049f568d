"""Pixel decoder: a feature pyramid whose every stage looks at the clip and at the words."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fewref.methods.layers.mlp import xavier_matrices

REDUCTIONS = {1: 8, 2: 4, 3: 2, 4: 1}  # stage (1 = stride 4 ... 4 = stride 32) -> spatial reduction of self attention


class VisionLanguageBlock(nn.Module):
    """Self attention over all pixels of a clip (at a reduced size), cross attention to the words, feed-forward part."""

    def __init__(self, channels: int, heads: int, ffn: int, reduction: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, heads, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(channels, heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(channels, ffn)
        self.linear2 = nn.Linear(ffn, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.reduction = reduction

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, words: Tensor, word_positions: Tensor, word_mask: Tensor
    ) -> Tensor:
        """x and positions (B,T,C,h,w), mask bool (B,T,h,w) True on padding, words and word_positions (B,L,C),
        word_mask bool (B,L) -> (B,T,C,h,w)."""
        size, tokens = x.shape, _tokens(x)
        tokens = self.norm1(tokens + self.dropout(self._look_around(x, positions, mask)))
        found, _ = self.multihead_attn(
            tokens + _tokens(positions), words + word_positions, words, key_padding_mask=word_mask, need_weights=False
        )
        tokens = self.norm2(tokens + self.dropout(found))
        hidden = self.dropout(self.linear1(tokens).relu_())
        tokens = self.norm3(tokens + self.dropout(self.linear2(hidden)))
        return _maps(tokens, size[1], *size[3:])

    def _look_around(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Self attention of every pixel to every pixel of the clip, at 1/reduction of the size: tokens (B,T*h*w,C)."""
        t, h, w = x.shape[1], *x.shape[3:]
        small = (max(1, h // self.reduction), max(1, w // self.reduction))
        placed = x + positions
        if self.reduction > 1:
            x, placed = (F.interpolate(item.flatten(0, 1), small).unflatten(0, item.shape[:2]) for item in (x, placed))
            mask = F.interpolate(mask.float(), small).bool()
        placed = _tokens(placed)
        found, _ = self.self_attn(placed, placed, _tokens(x), key_padding_mask=mask.flatten(1), need_weights=False)
        if self.reduction > 1:
            found = _maps(found, t, *small).flatten(0, 1)
            found = F.interpolate(found, (h, w), mode="bilinear", align_corners=False)
            found = _tokens(found.unflatten(0, (-1, t)))
        return found


def _tokens(maps: Tensor) -> Tensor:
    """(B,T,C,h,w) -> (B,T*h*w,C)."""
    return maps.permute(0, 1, 3, 4, 2).flatten(1, 3)


def _maps(tokens: Tensor, t: int, h: int, w: int) -> Tensor:
    """(B,T*h*w,C) -> (B,T,C,h,w)."""
    return tokens.unflatten(1, (t, h, w)).permute(0, 1, 4, 2, 3)


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

    def forward(
        self,
        maps: list[Tensor],
        masks: list[Tensor],
        positions: list[Tensor],
        words: Tensor,
        word_positions: Tensor,
        word_mask: Tensor,
    ) -> Tensor:
        """maps (B*T,C_s,h,w), masks bool (B*T,h,w) and positions (B*T,C,h,w) at strides 4, 8, 16, 32; words and
        word_positions (B,L,C), word_mask bool (B,L). Returns (B*T,outputs,h,w) at stride 4."""
        batch, y = len(words), None
        for stage in (4, 3, 2, 1):
            x, mask, position = (items[stage - 1] for items in (maps, masks, positions))
            x, mask, position = (
                item.unflatten(0, (batch, -1)) for item in (getattr(self, f"adapter_{stage}")(x), mask, position)
            )
            block = getattr(self, f"cross_attn_{stage}")
            x = block(x, position, mask, words, word_positions, word_mask).flatten(0, 1)
            if y is not None:
                x = x + F.interpolate(y, x.shape[-2:])
            y = getattr(self, f"layer_{stage}")(x)
        return self.mask_features(y)
