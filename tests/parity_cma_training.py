"""Golden checks of the training side of CMA: criterion, clip targets, resize rule, gradients.

`CHECKS` maps the stem of a golden file to its check; `test_parity_cma.py` runs them over every case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from fewref.episodes.transforms import check, flip, make_sample, normalised_boxes, resize, resize_size
from fewref.methods.layers.losses import criterion, stack_layers, stack_targets
from fewref.methods.layers.matcher import LossWeights, match, matching_cost

Check = Callable[[dict, Mapping[str, np.ndarray], Path], None]


def compare(case: dict, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Hold one output against its golden array at that array's stated tolerance."""
    actual = np.asarray(actual)
    tolerance = case["arrays"][name].get("tolerance", case["tolerance"])
    assert actual.shape == expected.shape, f"{case['file']}: {name} has shape {actual.shape}, not {expected.shape}"
    if tolerance == "exact":
        np.testing.assert_array_equal(actual, expected, err_msg=f"{case['file']}: {name}")
        return
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=f"{case['file']}: {name}"
    )


def case_weights(case: dict) -> LossWeights:
    given = case.get("weight_dict")
    return LossWeights(**{name: given[f"loss_{name}"] for name in vars(LossWeights())}) if given else LossWeights()


def check_criterion(case: dict, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    def predictions(prefix: str) -> dict:
        return {
            key: torch.from_numpy(arrays[f"in_{prefix}{key}"]) for key in ("pred_logits", "pred_boxes", "pred_masks")
        }

    layers = sum(name.endswith("_pred_logits") and name.startswith("in_aux") for name in arrays)
    outputs = {**predictions(""), "aux_outputs": [predictions(f"aux{layer}_") for layer in range(layers)]}
    targets = [
        {key: torch.from_numpy(arrays[f"in_t{clip}_{key}"]) for key in ("boxes", "masks", "valid")}
        for clip in range(len(outputs["pred_logits"]))
    ]
    weights = case_weights(case)
    total, terms = criterion(outputs, targets, weights)
    tubes = stack_layers(outputs)
    cost = matching_cost(tubes, stack_targets(targets, tubes), weights)
    assert sorted(terms) == sorted(case["loss_names"])
    compare(case, "out_losses", torch.stack([terms[name] for name in case["loss_names"]]), arrays["out_losses"])
    compare(case, "out_cost", cost, arrays["out_cost"])
    compare(case, "out_match", match(cost), arrays["out_match"])
    compare(case, "out_total", total, arrays["out_total"])


def check_clip_targets(case: dict, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    masks = arrays["in_object_ids"] == arrays["in_obj_id"]
    frames = np.zeros((*masks.shape, 3), np.uint8)
    sample = make_sample(frames, masks, case["caption"], swapped_clamp=True)
    compare(case, "out_boxes", sample.boxes, arrays["out_boxes"])
    compare(case, "out_valid", sample.valid, arrays["out_valid"])
    compare(case, "out_orig_size", np.array(sample.size[::-1]), arrays["out_orig_size"])
    compare(case, "out_masks_sum", sample.masks.sum((1, 2)), arrays["out_masks_sum"])
    compare(case, "out_flipped_boxes", flip(sample).boxes, arrays["out_flipped_boxes"])
    short, longest = (int(number) for number in re.search(r"short (\d+), max (\d+)", case["exercises"]).groups())
    resized = resize(sample, resize_size(*sample.size, short, longest))
    compare(case, "out_resized_size", np.array(resized.size), arrays["out_resized_size"])
    compare(case, "out_resized_boxes", resized.boxes, arrays["out_resized_boxes"])
    compare(case, "out_resized_masks", resized.masks, arrays["out_resized_masks"])
    checked = check(resized)
    compare(case, "out_checked_valid", checked.valid, arrays["out_checked_valid"])
    compare(case, "out_final_boxes", normalised_boxes(checked), arrays["out_final_boxes"])


def check_resize_sizes(case: dict, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    sizes = np.array([resize_size(*(int(number) for number in row)) for row in arrays["in_case"]])
    compare(case, "out_size", sizes, arrays["out_size"])


CHECKS: dict[str, Check] = {
    "criterion": check_criterion,
    "clip_targets": check_clip_targets,
    "resize_sizes": check_resize_sizes,
}
