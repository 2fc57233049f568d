"""Attention with several heads, with the parameters of PyTorch's own module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewref.kernels.dispatch import plain
from fewref.kernels.linear import linear, onednn_pays


class Attention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that never makes all weights, unless the reference is forced: batch first, embeddings of
    one size."""

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(channels, heads, dropout=dropout, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """query (B,N,C), key and value (B,M,C), padding bool (B,M), True where a key does not count -> (B,N,C)."""
        if key.shape[1] * self.num_heads < key.shape[2] and onednn_pays(query) and not plain():
            return self._to_few(query, key, value, padding)
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        projected = (linear(*item) for item in zip((query, key, value), weights, biases, strict=True))
        by_head = [item.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for item in projected]
        seen = None if padding is None else ~padding[:, None, None]
        attend = _by_definition if plain() else F.scaled_dot_product_attention
        found = attend(*by_head, attn_mask=seen, dropout_p=self.dropout * self.training)
        return linear(found.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)

    def _to_few(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        """The same where many queries attend to few keys, such as words: the projections of queries and results, which
        are linear, are applied to the keys and values instead."""
        heads, depth = self.num_heads, self.head_dim
        to_query, to_key, to_value = self.in_proj_weight.chunk(3)
        of_query, of_key, of_value = self.in_proj_bias.chunk(3)
        keys = F.linear(key, to_key, of_key).unflatten(-1, (heads, depth)) / math.sqrt(depth)  # (B,M,heads,depth)
        values = F.linear(value, to_value, of_value).unflatten(-1, (heads, depth))
        matrices = torch.einsum("bmhd,hdc->bhmc", keys, to_query.unflatten(0, (heads, depth)))
        biases = torch.einsum("bmhd,hd->bhm", keys, of_query.unflatten(0, (heads, depth)))
        if padding is not None:
            biases = biases.masked_fill(padding[:, None], torch.finfo(biases.dtype).min / 2)
        results = torch.einsum("bmhd,chd->bchm", values, self.out_proj.weight.unflatten(1, (heads, depth)))
        found = []
        for tokens, matrix, bias, result in zip(query, matrices, biases, results, strict=True):
            logits = linear(tokens, matrix.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape)
            found.append(linear(logits.softmax(-1).flatten(-2), result.flatten(1), self.out_proj.bias))
        return torch.stack(found)


def _by_definition(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> Tensor:
    logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    return F.dropout(logits.softmax(-1), dropout_p) @ value
