"""Golden checks of CMA's training: criterion, clip targets, resize rule, gradients.

`CHECKS` maps the stem of a golden file to its check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from golden_case import Expect
from parity_cma_network import build_net, forward

from fewref.episodes.transforms import check, flip, make_sample, normalised_boxes, resize, resize_size
from fewref.methods.layers.losses import criterion, stack_layers, stack_targets
from fewref.methods.layers.matcher import LossWeights, match, matching_cost

Arrays = Mapping[str, np.ndarray]
Check = Callable[[dict, Arrays, Path], None]


def case_weights(case: dict) -> LossWeights:
    given = case.get("weight_dict")
    upstream = [name for name in vars(LossWeights()) if name != "affinity"]  # which is an extension
    return LossWeights(**{name: given[f"loss_{name}"] for name in upstream}) if given else LossWeights()


def target(arrays: Arrays, prefix: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(arrays[f"in_{prefix}{name}"]) for name in ("boxes", "masks", "valid")}


def check_criterion(case: dict, arrays: Arrays, folder: Path) -> None:
    def predictions(prefix: str) -> dict:
        names = ("pred_logits", "pred_boxes", "pred_masks")
        return {name: torch.from_numpy(arrays[f"in_{prefix}{name}"]) for name in names}

    expect = Expect(case, arrays)
    layers = sum(re.fullmatch(r"in_aux\d+_pred_logits", name) is not None for name in arrays)
    outputs = {**predictions(""), "aux_outputs": [predictions(f"aux{layer}_") for layer in range(layers)]}
    targets = [target(arrays, f"t{clip}_") for clip in range(len(outputs["pred_logits"]))]
    weights = case_weights(case)
    total, terms = criterion(outputs, targets, weights)
    tubes = stack_layers(outputs)
    cost = matching_cost(tubes, stack_targets(targets, tubes), weights)
    assert sorted(terms) == sorted(case["loss_names"])
    expect("losses", torch.stack([terms[name] for name in case["loss_names"]]))
    expect("cost", cost)
    expect("match", match(cost))
    expect("total", total)
    expect.finish()


def check_clip_targets(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    masks = arrays["in_object_ids"] == arrays["in_obj_id"]
    frames = np.zeros((*masks.shape, 3), np.uint8)
    sample = make_sample(frames, masks, case["caption"], swapped_clamp=True)
    expect("boxes", sample.boxes)
    expect("valid", sample.valid)
    expect("orig_size", sample.size[::-1])
    expect("masks_sum", sample.masks.sum((1, 2)))
    expect("flipped_boxes", flip(sample).boxes)
    short, longest = (int(number) for number in re.search(r"short (\d+), max (\d+)", case["exercises"]).groups())
    resized = resize(sample, resize_size(*sample.size, short, longest))
    expect("resized_size", resized.size)
    expect("resized_boxes", resized.boxes)
    expect("resized_masks", resized.masks)
    checked = check(resized)
    expect("checked_valid", checked.valid)
    expect("final_boxes", normalised_boxes(checked))
    expect.finish()


def check_resize_sizes(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    expect("size", [resize_size(*(int(number) for number in row)) for row in arrays["in_case"]])
    expect.finish()


def check_train_gradients(case: dict, arrays: Arrays, folder: Path) -> None:
    net, expect = build_net(case, folder), Expect(case, arrays)
    net.training = True  # of the network alone: its parts stay in eval mode, that is without dropout
    try:
        outputs = forward(net, arrays)
        total, terms = criterion(outputs, [target(arrays, "target_")])
        total.backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    finally:
        net.training = False
        net.zero_grad(set_to_none=True)
    assert sorted(outputs) == sorted(case["output_keys_in_train_mode"])
    expect("total", total)
    expect("losses", torch.stack([terms[name] for name in case["loss_names"]]))
    expect("gradnorm", torch.stack([gradients[name].norm() for name in case["grad_names"]]))
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert sorted(without) == case["parameters_without_gradient_outside_backbone_and_text_encoder"]
    zero = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
    assert zero == case["parameters_with_exactly_zero_gradient"]
    expect.finish()


CHECKS: dict[str, Check] = {
    "criterion": check_criterion,
    "clip_targets": check_clip_targets,
    "resize_sizes": check_resize_sizes,
    "train_gradients": check_train_gradients,
}
