"""Matcher and losses against plain loops over frames, pixels and queries, written from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou

from fewref.methods.layers.boxes import generalised_iou, to_centres, to_corners
from fewref.methods.layers.losses import affinity_loss, criterion, stack_layers, stack_targets, valid_frames
from fewref.methods.layers.matcher import LossWeights, match, matching_cost

B, T, Q, H, W = 3, 4, 5, 7, 9


def make(seed: int = 0, layers: int = 2) -> tuple[dict, list[dict]]:
    rng = torch.Generator().manual_seed(seed)

    def prediction() -> dict:
        return {
            "pred_logits": torch.randn(B, T, Q, 1, generator=rng),
            "pred_boxes": torch.rand(B, T, Q, 4, generator=rng),
            "pred_masks": torch.randn(B, T, Q, H, W, generator=rng) * 2,
        }

    outputs = prediction() | {"aux_outputs": [prediction() for _ in range(layers - 1)]}
    targets = [
        {
            "boxes": torch.rand(T, 4, generator=rng),
            "masks": torch.rand(T, H * 4 - 3 - b, W * 4 - 5 * b, generator=rng) > 0.5,
            "valid": torch.tensor([1, 1, 0, 1 - b % 2]),
        }
        for b in range(B)
    ]
    return outputs, targets


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def focal(logit: float, positive: bool) -> float:
    p = sigmoid(logit)
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


def giou(one: np.ndarray, two: np.ndarray) -> float:
    a, b = ([x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in (one, two))
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    union = one[2] * one[3] + two[2] * two[3] - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return (overlap + 1e-6) / (union + 1e-6) - (hull - union + 1e-6) / (hull + 1e-6)


def small_mask(target: dict, frame: int) -> np.ndarray:
    mask = target["masks"][frame].numpy()
    height, width = mask.shape
    cells = [[i < height and j < width and mask[i, j] for j in range(2, 4 * W, 4)] for i in range(2, 4 * H, 4)]
    return np.array(cells, float)


def tube_parts(output: dict, target: dict, b: int, q: int) -> dict[str, float]:
    """Means over the tube of one query: class cost, L1, GIoU, mask focal, dice quotient."""
    parts = dict.fromkeys(("cls", "l1", "giou", "focal"), 0.0)
    shared = total = 0.0
    for t in range(T):
        p = sigmoid(output["pred_logits"][b, t, q, 0].item())
        parts["cls"] += (0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)) / T
        box, truth = output["pred_boxes"][b, t, q].numpy(), target["boxes"][t].numpy()
        parts["l1"] += float(np.abs(box - truth).sum()) / T
        parts["giou"] += giou(box, truth) / T
        mask = small_mask(target, t)
        for i in range(H):
            for j in range(W):
                logit = output["pred_masks"][b, t, q, i, j].item()
                parts["focal"] += focal(logit, bool(mask[i, j])) / (T * H * W)
                shared += sigmoid(logit) * mask[i, j]
                total += sigmoid(logit) + mask[i, j]
    return parts | {"dice": (2 * shared + 1) / (total + 1)}


def expected(output: dict, targets: list[dict]) -> tuple[np.ndarray, dict[str, float]]:
    """Costs (B,Q) and the five terms of one layer."""
    parts = [[tube_parts(output, targets[b], b, q) for q in range(Q)] for b in range(B)]
    costs = np.array(
        [[2 * p["cls"] + 5 * p["l1"] - 2 * p["giou"] + 2 * p["focal"] - 5 * p["dice"] for p in row] for row in parts]
    )
    count = sum(int(target["valid"].sum()) for target in targets)
    terms = dict.fromkeys(("ce", "bbox", "giou", "mask", "dice"), 0.0)
    for b, target in enumerate(targets):
        best = int(costs[b].argmin())
        chosen = parts[b][best]
        for t in range(T):
            for q in range(Q):
                hit = q == best and bool(target["valid"][t])
                terms["ce"] += focal(output["pred_logits"][b, t, q, 0].item(), hit) / count
        terms["bbox"] += chosen["l1"] * T / count
        terms["giou"] += (1 - chosen["giou"]) * T / count
        terms["mask"] += chosen["focal"] / count
        terms["dice"] += (1 - chosen["dice"]) / count
    return costs, terms


def test_against_loops() -> None:
    outputs, targets = make()
    total, terms = criterion(outputs, targets)
    tubes = stack_layers(outputs)
    cost = matching_cost(tubes, stack_targets(targets, tubes), LossWeights())
    weighted = 0.0
    for layer, (output, suffix) in enumerate([(outputs, ""), (outputs["aux_outputs"][0], "_0")]):
        costs, values = expected(output, targets)
        np.testing.assert_allclose(cost[layer], costs, atol=2e-5)
        np.testing.assert_array_equal(match(cost)[layer], costs.argmin(1))
        for name, value in values.items():
            assert terms[f"loss_{name}{suffix}"].item() == pytest.approx(value, abs=2e-5), name + suffix
            weighted += {"ce": 2, "bbox": 5, "giou": 2, "mask": 2, "dice": 5}[name] * value
    assert total.item() == pytest.approx(weighted, abs=1e-4)
    assert len(terms) == 10


def test_one_clip_logs_cardinality() -> None:
    outputs, targets = make(layers=1)
    single = {name: value[:1] for name, value in outputs.items() if name != "aux_outputs"}
    assert criterion(single, targets[:1])[1]["cardinality_error"] == T


def test_weights_count() -> None:
    outputs, targets = make()
    total, terms = criterion(outputs, targets, LossWeights(ce=0, bbox=0, giou=0, mask=0, dice=3))
    assert total.item() == pytest.approx(3 * (terms["loss_dice"] + terms["loss_dice_0"]).item(), rel=1e-6)


def test_only_the_matched_query_gets_box_and_mask_gradient() -> None:
    outputs, targets = make(layers=1)
    boxes = outputs["pred_boxes"].requires_grad_()
    masks = outputs["pred_masks"].requires_grad_()
    criterion(outputs, targets, LossWeights())[0].backward()
    tubes = stack_layers(outputs)
    chosen = match(matching_cost(tubes, stack_targets(targets, tubes), LossWeights()))[0]
    for b in range(B):
        touched = [q for q in range(Q) if boxes.grad[b, :, q].any() or masks.grad[b, :, q].any()]
        assert touched == [chosen[b].item()]


def test_a_clip_without_object_is_finite() -> None:
    outputs, targets = make(layers=1)
    for target in targets:
        target["masks"] = torch.zeros_like(target["masks"])
        target["boxes"], target["valid"] = torch.zeros(T, 4), torch.zeros(T, dtype=torch.long)
    total, terms = criterion(outputs, targets)
    assert total.isfinite()
    assert valid_frames(torch.zeros(2, 3)) == 1
    logits = outputs["pred_logits"].flatten().tolist()
    assert terms["loss_ce"].item() == pytest.approx(sum(focal(x, False) for x in logits), rel=1e-4)


def test_half_precision_outputs_are_judged_in_single() -> None:
    outputs, targets = make(layers=1)
    coarse = {name: value.bfloat16() for name, value in outputs.items() if name != "aux_outputs"}
    same = {name: value.float() for name, value in coarse.items()}
    assert criterion(coarse, targets)[0].item() == criterion(same, targets)[0].item()


def test_boxes() -> None:
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6], [0.3, 0.3, 0.0, 0.0]])
    corners = to_corners(boxes)
    torch.testing.assert_close(corners[0], torch.tensor([0.4, 0.1, 0.6, 0.7]))
    torch.testing.assert_close(to_centres(corners), boxes)
    assert generalised_iou(corners[1], corners[1]) == 0  # 1 less 1: both quotients are of the small constants


def test_giou_agrees_with_torchvision_on_boxes_of_some_size() -> None:
    rng = torch.Generator().manual_seed(1)
    one, two = (to_corners(torch.rand(50, 4, generator=rng) + 0.1) for _ in range(2))
    torch.testing.assert_close(generalised_iou(one, two), generalized_box_iou(one, two).diagonal(), atol=1e-4, rtol=0)


def test_affinity_loss_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(3, 2, 2, 3, generator=generator)
    masks = (torch.rand(3, 2, 8, 12, generator=generator) > 0.6).float()
    masks[1] = 0  # a clip that does not show its target says nothing
    wanted = []
    for clip in (0, 2):
        hits, misses, common, squares, inside, outside = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for t in range(2):
            for y in range(2):
                for x in range(3):
                    part = float(masks[clip, t, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean())
                    a = float(share[clip, t, y, x])
                    hits, misses = hits - part * math.log(a), misses - (1 - part) * math.log(1 - a)
                    common, squares = common + a * part, squares + a * a + part * part
                    inside, outside = inside + part, outside + 1 - part
        wanted.append(hits / max(inside, 1) + misses / max(outside, 1) + 1 - 2 * common / squares)
    if not (masks[2].unflatten(-1, (3, 4)).unflatten(-3, (2, 4)).mean((-1, -3)) > 0.5).any():
        pytest.fail("the drawn masks must show the target at the coarse size")
    assert float(affinity_loss([share], masks)) == pytest.approx(np.mean(wanted), rel=1e-5)


def test_the_affinity_joins_the_total_with_its_weight() -> None:
    outputs, targets = make()
    height, width = outputs["pred_masks"].shape[-2:]
    share = torch.full((*outputs["pred_logits"].shape[:2], height // 2, width // 2), 0.3, requires_grad=True)
    plain, _ = criterion(outputs, targets)
    total, terms = criterion({**outputs, "affinity": [share, share, share]}, targets, LossWeights(affinity=4))
    torch.testing.assert_close(total - plain, 4 * terms["loss_affinity"])
    assert "loss_affinity" not in criterion(outputs, targets)[1]


def test_the_matching_has_weights_of_its_own() -> None:
    outputs, targets = make()
    heavy = LossWeights(ce=500)
    _, together = criterion(outputs, targets, heavy)
    _, apart = criterion(outputs, targets, heavy, LossWeights())
    _, plain = criterion(outputs, targets)
    assert {name: float(v) for name, v in apart.items()} == {name: float(v) for name, v in plain.items()}
    assert any(float(together[name]) != float(plain[name]) for name in plain)
