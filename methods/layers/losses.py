"""The training loss of query models with one target per clip: class, box, mask, on every decoder layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from fewref.methods.layers.boxes import generalised_iou, to_corners
from fewref.methods.layers.matcher import LossWeights, Truth, Tubes, match, matching_cost, tube_dice

STRIDE = 4  # of the predicted masks
AFFINITY_LEVELS = 2  # the finest, where an object covers several tokens


def criterion(
    outputs: dict,
    targets: list[dict[str, Tensor]],
    weights: LossWeights | None = None,
    matching: LossWeights | None = None,
    classify_valid: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss () and its unweighted terms, each a tensor () on the device of the outputs.

    outputs: `pred_logits` (B,T,Q,K), `pred_boxes` (B,T,Q,4) cxcywh in [0,1], `pred_masks` (B,T,Q,h,w) at stride 4 of
    the padded input, and `aux_outputs`, a list of the same for earlier decoder layers.
    targets: per clip `boxes` (T,4) cxcywh in [0,1], `masks` (T,H,W) 0/1 at the unpadded input size, `valid` (T,) 0/1,
    and for K > 1 `labels` int (T,) in 0..K-1.
    terms: loss_ce, loss_bbox, loss_giou, loss_mask, loss_dice and, for B = K = 1, cardinality_error (logged only), then
    the same with suffix _0, _1, ... for the earlier layers, each with its own matching. Computed in float32.
    weights: of the terms in the total; matching: in the cost of the matching, the same unless given;
    classify_valid: see `matching_cost`.
    Box terms count invalid frames and mask terms are divided by the number of frames, as upstream does.
    Source: specifications of CMA, section 6 (`hengliusky/Few_shot_RVOS`), and of ReferFormer, section 7
    (`wjn922/ReferFormer`).
    """
    weights = weights or LossWeights()
    tubes = stack_layers(outputs)
    truth = stack_targets(targets, tubes)
    chosen = match(matching_cost(tubes, truth, matching or weights, classify_valid))
    by_layer = layer_losses(tubes, truth, chosen)
    total = sum(getattr(weights, name) * value.sum() for name, value in by_layer.items())
    extra = {}
    if "affinity" in outputs:
        extra["loss_affinity"] = affinity_loss(outputs["affinity"][:AFFINITY_LEVELS], truth.masks)
        total = total + weights.affinity * extra["loss_affinity"]
    if len(targets) == tubes.logits.shape[-1] == 1:
        # With one class the predicted count is always 0, so the error is the number of frames.
        frames = tubes.logits.shape[2]
        by_layer["cardinality"] = tubes.logits.new_full((len(tubes.logits),), frames)
    terms = {}
    for layer in range(len(tubes.logits)):
        suffix = "" if layer == 0 else f"_{layer - 1}"
        for name, value in by_layer.items():
            label = "cardinality_error" if name == "cardinality" else f"loss_{name}"
            terms[label + suffix] = value[layer].detach()
    return total, terms | {name: value.detach() for name, value in extra.items()}


def stack_layers(outputs: dict) -> Tubes:
    """Final layer first, then the auxiliary ones in order, as float32."""
    layers = [outputs, *outputs.get("aux_outputs", ())]
    return Tubes(
        torch.stack([layer["pred_logits"] for layer in layers]).float(),
        torch.stack([layer["pred_boxes"] for layer in layers]).float(),
        torch.stack([layer["pred_masks"] for layer in layers]).float(),
    )


def stack_targets(targets: list[dict[str, Tensor]], tubes: Tubes) -> Truth:
    """Targets of all clips on the grid of the predicted masks: every fourth pixel from 2, zero on padding."""
    height, width = tubes.masks.shape[-2:]
    device = tubes.masks.device
    clips, frames, _, classes = tubes.logits.shape[1:]
    labels = torch.zeros(clips, frames, dtype=torch.long, device=device)
    if classes > 1:
        labels = torch.stack([target["labels"] for target in targets]).to(device)
    masks = []
    for target in targets:
        mask = target["masks"].to(device).float()[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
        masks.append(F.pad(mask, (0, width - mask.shape[-1], 0, height - mask.shape[-2])))
    boxes = torch.stack([target["boxes"] for target in targets]).to(device).float()
    valid = torch.stack([target["valid"] for target in targets]).to(device).float()
    return Truth(boxes, torch.stack(masks), valid, labels)


def layer_losses(tubes: Tubes, truth: Truth, chosen: Tensor) -> dict[str, Tensor]:
    """Terms (D,) per layer, for the queries `chosen` (D,B), summed over clips and divided by the valid frames."""
    layers, clips, _, queries, classes = tubes.logits.shape
    count = valid_frames(truth.valid)
    present = F.one_hot(truth.labels, classes) * truth.valid[..., None]  # (B,T,K)
    positive = F.one_hot(chosen, queries)[:, :, None, :, None] * present[:, :, None]  # (D,B,T,Q,K)
    layer, clip = torch.meshgrid(
        torch.arange(layers, device=chosen.device), torch.arange(clips, device=chosen.device), indexing="ij"
    )
    boxes = tubes.boxes[layer, clip, :, chosen]  # (D,B,T,4)
    masks = tubes.masks[layer, clip, :, chosen]  # (D,B,T,h,w)
    overlap = generalised_iou(to_corners(boxes), to_corners(truth.boxes))
    focal = sigmoid_focal_loss(masks, truth.masks.expand_as(masks), alpha=0.25, gamma=2.0)
    sums = {
        "ce": sigmoid_focal_loss(tubes.logits, positive, alpha=0.25, gamma=2.0).sum((1, 2, 3, 4)),
        "bbox": (boxes - truth.boxes).abs().sum((1, 2, 3)),
        "giou": (1 - overlap).sum((1, 2)),
        "mask": focal.mean((2, 3, 4)).sum(1),
        "dice": (1 - tube_dice(masks, truth.masks)).sum(1),
    }
    return {name: value / count for name, value in sums.items()}


def affinity_loss(maps: list[Tensor], masks: Tensor) -> Tensor:
    """Attention to the object in the support as a segmentation of the target: binary cross-entropy, target and rest
    weighing the same, plus dice; mean over the levels and the clips that show the target, ().

    maps: per level (B,T,h,w) in [0,1]; masks: targets float (B,T,H,W), 0/1, at a multiple of each level's size.
    """
    losses = []
    for share in maps:
        truth = F.adaptive_avg_pool2d(masks, share.shape[-2:])
        shown = (truth.flatten(1).amax(1) > 0.5).float()
        share = share.float().clamp(1e-5, 1 - 1e-5)
        inside, outside = ((part.flatten(1), part.flatten(1).sum(1).clamp(min=1)) for part in (truth, 1 - truth))
        hit, miss = share.log().flatten(1), (1 - share).log().flatten(1)
        cross = -(inside[0] * hit).sum(1) / inside[1] - (outside[0] * miss).sum(1) / outside[1]
        common = 2 * (share * truth).flatten(1).sum(1)
        dice = 1 - common / (share.square() + truth.square()).flatten(1).sum(1)
        losses.append(((cross + dice) * shown).sum() / shown.sum().clamp(min=1))
    return torch.stack(losses).mean()


def valid_frames(valid: Tensor) -> Tensor:
    """Number of valid frames (), the mean over all training processes, at least 1."""
    count = valid.sum()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)
