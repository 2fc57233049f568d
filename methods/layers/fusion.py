"""Early fusion of vision and language."""

from __future__ import annotations

from torch import Tensor, nn


class VisionLanguageFusion(nn.Module):
    """Visual tokens attend to the words and are multiplied by what they find; no residual, no norm, no dropout."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, tokens: Tensor, words: Tensor, word_positions: Tensor, word_mask: Tensor) -> Tensor:
        """tokens (B,N,C), words (B,L,C), word_positions (B,L,C), word_mask bool (B,L) True on padding -> (B,N,C)."""
        found, _ = self.multihead_attn(
            tokens, words + word_positions, words, key_padding_mask=word_mask, need_weights=False
        )
        return tokens * found
