"""CMA's affinity: single-head attention of every query pixel to the pixels of one or more key frames."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewref.kernels.dispatch import choose
from fewref.kernels.linear import linear, onednn_pays

ROWS = 1024  # queries whose attention to all keys is held at once


def affinity(query: Tensor, keys: Tensor, values: Tensor, backend: str | None = None) -> Tensor:
    """softmax over the keys of (keys . query) / sqrt(C), times the values; no mask, no dropout.

    query: (B,N,C); keys: (B,M,C); values: (B,M,V). backend: see `dispatch.choose`, which says what it raises. Returns
    (B,N,V). Only "reference" holds the N x M matrix where PyTorch has a fused attention kernel; on a CPU without
    gradients "pytorch" holds a few rows of it, which is faster yet. Source: kernels specification 2
    (hengliusky/Few_shot_RVOS).
    """
    if choose("affinity", query.device, query.dtype, backend) == "reference":
        return (query @ keys.transpose(1, 2) / math.sqrt(query.shape[2])).softmax(-1) @ values
    if onednn_pays(query):
        return torch.stack([_by_rows(*item) for item in zip(query, keys, values, strict=True)])
    # Token-major copies with a head axis: on transposed views PyTorch falls back to the unfused form without a word.
    query, keys, values = (tensor.contiguous().unsqueeze(1) for tensor in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values).squeeze(1)


def _by_rows(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `affinity` without B: both products are linear layers, whose weights are the keys and the values."""
    scaled, columns = keys / math.sqrt(query.shape[1]), values.t().contiguous()
    parts = [linear(linear(rows, scaled).softmax(-1), columns) for rows in query.split(ROWS)]
    return torch.cat(parts)
