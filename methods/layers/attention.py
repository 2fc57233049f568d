"""Attention with several heads, with the parameters of PyTorch's own module."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fewref.kernels.linear import linear


class Attention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that never makes the weights: batch first, embeddings of one size."""

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(channels, heads, dropout=dropout, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """query (B,N,C), key and value (B,M,C), padding bool (B,M), True where a key does not count -> (B,N,C)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        projected = (linear(*item) for item in zip((query, key, value), weights, biases, strict=True))
        by_head = [item.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for item in projected]
        seen = None if padding is None else ~padding[:, None, None]
        found = F.scaled_dot_product_attention(*by_head, attn_mask=seen, dropout_p=self.dropout * self.training)
        return linear(found.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
