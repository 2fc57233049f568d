"""Early fusion of vision and language."""

from __future__ import annotations

from torch import Tensor, nn

from fewref.methods.layers.attention import Attention
from fewref.methods.layers.piecewise import in_chunks


class VisionLanguageFusion(nn.Module):
    """Visual tokens attend to the words and are multiplied by what they find; no residual, no norm, no dropout."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = Attention(channels, heads)

    def forward(self, tokens: Tensor, words: Tensor, word_positions: Tensor, word_mask: Tensor) -> Tensor:
        """tokens (B,N,C), words (B,L,C), word_positions (B,L,C), word_mask bool (B,L) True on padding -> (B,N,C)."""
        placed = words + word_positions
        return in_chunks(lambda part: part * self.multihead_attn(part, placed, words, word_mask), tokens)
