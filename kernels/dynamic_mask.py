"""Dynamic mask head (CondInst): a tiny per-pixel network whose weights are predicted for every query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewref.kernels.dispatch import choose


def parameter_counts(channels: int, width: int, layers: int, coordinates: bool = True) -> tuple[list[int], list[int]]:
    """Numbers of weights and of biases per layer of a head which maps `channels` features to one logit.

    For 256 features, width 8 and three layers with coordinates: [2064, 64, 8] and [8, 8, 1], in all 2153.
    """
    inputs = channels + 2 * coordinates
    weights = [inputs * width] + [width * width] * (layers - 2) + [width]
    return weights, [width] * (layers - 1) + [1]


def dynamic_mask_head(
    features: Tensor,
    parameters: Tensor,
    references: Tensor | None,
    *,
    stride: int = 4,
    width: int = 8,
    layers: int = 3,
    backend: str | None = None,
) -> Tensor:
    """Mask logits of every query, without a copy of the features per query.

    features: (N,C,h,w); parameters: (N,Q,G), all weights layer by layer (output-major), then all biases;
    references: (N,Q,2) as (x,y) in pixels of the unpadded input, or None for a head without coordinates; stride: pixels
    per cell; backend: see `dispatch.choose`. Returns logits (N,Q,h,w), float32 at least. Raises ValueError where G does
    not fit, and as `choose` does. Source: kernels specification 3.
    """
    weight_counts, bias_counts = parameter_counts(features.shape[1], width, layers, references is not None)
    if parameters.shape[2] != sum(weight_counts) + sum(bias_counts):
        raise ValueError(f"{parameters.shape[2]} parameters per query, expected {sum(weight_counts + bias_counts)}")
    chunks = parameters.split(weight_counts + bias_counts, dim=2)
    weights, biases = chunks[:layers], [bias.float() for bias in chunks[layers:]]
    plain = choose("dynamic_mask", features.device, features.dtype, backend) == "reference"
    return (_repeat if plain else _split)(features, weights, biases, references, stride)


def _split(
    features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], references: Tensor | None, stride: int
) -> Tensor:
    """The first layer as one product for the features of a frame and an outer sum for the coordinates."""
    n, c, h, w = features.shape
    q, width = biases[0].shape[1:]
    first = weights[0].reshape(n, q * width, -1)
    x = (first[..., :c] @ features.flatten(2)).float().view(n, q, width, h, w)
    x = x + biases[0][..., None, None]
    with torch.autocast(features.device.type, enabled=False):
        if references is not None:
            x = x + _coordinate_terms(first[..., c:].float().view(n, q, width, 2), references.float(), h, w, stride)
        x = x.flatten(3)  # (N,Q,width,h*w)
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            matrix = weight.float().reshape(n, q, -1, width)
            x = matrix @ x.relu() + bias.reshape(n, q, -1, 1)
    return x.view(n, q, h, w)


def _repeat(
    features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], references: Tensor | None, stride: int
) -> Tensor:
    """As CondInst has it: a copy of the features and two maps of coordinates per query, convolved in groups."""
    n, _, h, w = features.shape
    q = biases[0].shape[1]
    with torch.autocast(features.device.type, enabled=False):
        x = features.float()[:, None].expand(-1, q, -1, -1, -1)
        if references is not None:
            columns, rows = _centres(w, stride, features.device), _centres(h, stride, features.device)
            cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # (2,h,w)
            x = torch.cat((x, references.float()[..., None, None] - cells), 2)
        x = x.reshape(1, -1, h, w)
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            outputs = n * q * bias.shape[2]
            kernel = weight.float().reshape(outputs, -1, 1, 1)
            x = F.conv2d(x.relu() if layer else x, kernel, bias.reshape(-1), groups=n * q)
    return x.view(n, q, h, w)


def _centres(count: int, stride: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.float32) * stride + stride // 2


def _coordinate_terms(weights: Tensor, references: Tensor, h: int, w: int, stride: int) -> Tensor:
    """Share (N,Q,width,h,w) of the two relative coordinates in the first layer, an outer sum of a row and a column.

    The difference is taken before the product: coordinates reach hundreds of pixels, and expanding would cancel.
    """
    columns, rows = _centres(w, stride, weights.device), _centres(h, stride, weights.device)
    along_x = weights[..., 0, None] * (references[..., 0, None] - columns)[:, :, None]  # (N,Q,width,w)
    along_y = weights[..., 1, None] * (references[..., 1, None] - rows)[:, :, None]
    return along_x[..., None, :] + along_y[..., None]


def aligned_bilinear(x: Tensor, factor: int) -> Tensor:
    """Enlarge (N,C,h,w) by a whole factor so that the cells' corners, not their centres, stay aligned (CondInst)."""
    if factor == 1:
        return x
    h, w = x.shape[-2:]
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, size=(factor * h + 1, factor * w + 1), mode="bilinear", align_corners=True)
    x = F.pad(x, (factor // 2, 0, factor // 2, 0), mode="replicate")
    return x[..., : factor * h, : factor * w]
