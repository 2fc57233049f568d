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
    projection: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mask logits of every query, without a copy of the features per query.

    features: (N,C,h,w); parameters: (N,Q,G), all weights layer by layer (output-major), then all biases;
    references: (N,Q,2) as (x,y) in pixels of the unpadded input, or None for a head without coordinates; stride: pixels
    per cell; projection: weight (C,C',k,k) and bias (C,) of a convolution that the features, then (N,C',h,w), have yet
    to pass; folded into the first layer where that makes it smaller. backend: see `dispatch.choose`. Returns logits
    (N,Q,h,w), float32 at least. Raises ValueError where G does not fit, and as `choose` does.
    Source: kernels specification 3.
    """
    channels = features.shape[1] if projection is None else len(projection[0])
    weight_counts, bias_counts = parameter_counts(channels, width, layers, references is not None)
    if parameters.shape[2] != sum(weight_counts) + sum(bias_counts):
        raise ValueError(f"{parameters.shape[2]} parameters per query, expected {sum(weight_counts + bias_counts)}")
    chunks = parameters.split(weight_counts + bias_counts, dim=2)
    weights, biases = chunks[:layers], [bias.float() for bias in chunks[layers:]]
    plain = choose("dynamic_mask", features.device, features.dtype, backend) == "reference"
    if projection is not None and (plain or parameters.shape[1] * width >= channels):
        features, projection = _project(features, *projection), None
    if plain:
        return _repeat(features, weights, biases, references, stride)
    first = weights[0].unflatten(2, (width, -1))  # (N,Q,width,C+2)
    x = _first_products(features, first[..., :channels], projection)
    return _split(x, first[..., channels:], weights[1:], biases, references, stride)


def _project(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(features, weight, bias, padding=weight.shape[-1] // 2)


def _first_products(features: Tensor, weights: Tensor, projection: tuple[Tensor, Tensor] | None) -> Tensor:
    """Weights (N,Q,width,C) times the features of their frame, read once: float32 (N,Q,width,h,w)."""
    h, w = features.shape[2:]
    rows = weights.flatten(1, 2)
    if projection is None:
        x = rows @ features.flatten(2)
    else:
        kernels = (rows @ projection[0].flatten(1)).unflatten(2, projection[0].shape[1:])  # (N,Q*width,C',k,k)
        frames = zip(features.split(1), kernels, rows @ projection[1], strict=True)
        x = torch.cat([_project(frame, kernel, bias) for frame, kernel, bias in frames])
    return x.float().reshape(*weights.shape[:3], h, w)


def _split(
    x: Tensor,
    along: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    references: Tensor | None,
    stride: int,
) -> Tensor:
    """The rest of the first layer, x being its share of the features and `along` (N,Q,width,2) the weights of the
    coordinates, an outer sum; and the later layers."""
    n, q, width, h, w = x.shape
    x = x + biases[0][..., None, None]
    with torch.autocast(x.device.type, enabled=False):
        if references is not None:
            x = x + _coordinate_terms(along.float(), references.float(), h, w, stride)
        x = x.flatten(3)  # (N,Q,width,h*w)
        for weight, bias in zip(weights, biases[1:], strict=True):
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
