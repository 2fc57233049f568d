"""Masks of the queries: a controller predicts a tiny network per query, frame and decoder layer."""

from __future__ import annotations

from torch import Tensor, nn

from fewref.kernels.dynamic_mask import dynamic_mask_head, parameter_counts
from fewref.methods.layers.mlp import MLP


def build_controller(
    channels: int, mask_channels: int, width: int = 8, layers: int = 3, coordinates: bool = True
) -> MLP:
    """MLP from a query's state (channels) to the parameters of its mask head; Xavier weights, zero biases."""
    weights, biases = parameter_counts(mask_channels, width, layers, coordinates)
    controller = MLP(channels, channels, sum(weights) + sum(biases), 3)
    for layer in controller.layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return controller


def layer_masks(
    features: Tensor,
    parameters: Tensor,
    boxes: Tensor | None,
    sizes: Tensor,
    width: int = 8,
    depth: int = 3,
    projection: nn.Conv2d | None = None,
) -> Tensor:
    """Mask logits of all queries of all given decoder layers, in one pass over the features.

    features (N,C,h,w) at stride 4; parameters (layers,N,Q,G) from the controller; boxes (layers,N,Q,4) cxcywh in [0,1],
    of which the centre is used, or None for heads without coordinates; sizes (N,2), the unpadded input (H,W) in pixels;
    width and depth: of the tiny network; projection: a last layer that the features have yet to pass.
    Returns (layers,N,Q,h,w).
    """
    layers, _, q, _ = parameters.shape
    by_frame = parameters.transpose(0, 1).flatten(1, 2)
    centres = None
    if boxes is not None:
        centres = (boxes[..., :2] * sizes.flip(-1).to(boxes)[:, None]).transpose(0, 1).flatten(1, 2)
    last = None if projection is None else (projection.weight, projection.bias)
    logits = dynamic_mask_head(features, by_frame, centres, stride=4, width=width, layers=depth, projection=last)
    return logits.unflatten(1, (layers, q)).transpose(0, 1)
