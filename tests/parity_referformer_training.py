"""Golden checks of ReferFormer's training and metrics; `CHECKS` maps the stem of a golden file to its check."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from golden_case import Expect
from parity_referformer_modules import Arrays, Check
from parity_referformer_whole import build_net, forward
from torch import Tensor

from fewref.benchmark.a2d import THRESHOLDS, a2d_metrics
from fewref.episodes.transforms import ClipSample, check, crop, flip, make_sample, normalised_boxes, resize, resize_size
from fewref.methods.layers.losses import criterion, stack_layers, stack_targets
from fewref.methods.layers.matcher import LossWeights, match, matching_cost
from fewref.methods.referformer.clip_sampling import sample_clip

PREDICTIONS = ("pred_logits", "pred_boxes", "pred_masks")
TERMS = ("ce", "bbox", "giou", "mask", "dice")


def scalar_names(case: dict, name: str) -> list[str]:
    """The names of the scalars in an array, as its description lists them."""
    listed = re.search(r"in this order: ([^ .](?:[^ ]|(?<=,) )*)", case["arrays"][name]["meaning"])[1]
    names = listed.rstrip(".").split(", ")
    assert [len(names)] == case["arrays"][name]["shape"], f"{case['file']}: {name} lists {len(names)} scalars"
    return names


def clip_targets(arrays: Arrays) -> list[dict[str, Tensor]]:
    """The targets of all clips of a case."""
    clips = sum(re.fullmatch(r"tgt\d+_masks", name) is not None for name in arrays)
    names = ("boxes", "masks", "valid", "labels")
    return [{name: torch.from_numpy(arrays[f"tgt{clip}_{name}"]) for name in names} for clip in range(clips)]


def factors(told: Mapping[str, float], **renamed: str) -> LossWeights:
    """Weights of the five terms, told under their own names or others."""
    return LossWeights(**{term: told[renamed.get(term, term)] for term in TERMS})


def check_criterion(case: dict, arrays: Arrays, folder: Path) -> None:
    expect, options = Expect(case, arrays), case["constructor"]
    assert options["focal_alpha"] == 0.25
    count = sum(re.fullmatch(r"out\d+_pred_logits", name) is not None for name in arrays)
    layers = [
        {name: torch.from_numpy(arrays[f"out{layer}_{name}"]).requires_grad_() for name in PREDICTIONS}
        for layer in range(count)
    ]
    outputs = {**layers[-1], "aux_outputs": layers[:-1]}
    targets = clip_targets(arrays)
    weights = factors({name.removeprefix("loss_"): value for name, value in options["weights"].items()})
    costs = factors(options["costs"], ce="cls")
    total, terms = criterion(outputs, targets, weights, costs, classify_valid=True)
    total.backward()
    values = {**terms, "total": total}
    for layer, outputs in enumerate(layers):
        values |= {f"grad{layer}_{name}_norm": item.grad.norm() for name, item in outputs.items()}
    expect("loss_values", torch.stack([values[name].detach() for name in scalar_names(case, "loss_values")]))
    tubes = stack_layers({**layers[-1], "aux_outputs": layers[:-1]})
    chosen = match(matching_cost(tubes, stack_targets(targets, tubes), costs, classify_valid=True))
    for layer in range(count):
        expect(f"match{layer}", chosen[(layer + 1) % count])  # ours begin with the last layer
    expect.finish()


def check_train_step(case: dict, arrays: Arrays, folder: Path) -> None:
    net, expect, targets = build_net(case), Expect(case, arrays), clip_targets(arrays)
    sizes = torch.stack([torch.from_numpy(arrays[f"tgt{clip}_size"]) for clip in range(len(targets))])
    net.training = True  # of the network alone: its parts stay in eval mode, that is without dropout
    try:
        outputs = forward(net, case, arrays, sizes)
        total, terms = criterion(outputs, targets, classify_valid=True)
        total.backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    finally:
        net.training = False
        net.zero_grad(set_to_none=True)
    norms = {f"gradnorm:{name}": gradient.norm() for name, gradient in tied_too(net, gradients).items()}
    norms["gradnorm:ALL"] = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    values = {**terms, **norms, "total": total.detach()}
    expect("values", torch.stack([values[name] for name in scalar_names(case, "values")]))
    tubes = stack_layers(outputs)
    expect("match", match(matching_cost(tubes, stack_targets(targets, tubes), LossWeights(), classify_valid=True))[0])
    told = case["notes"]["params_without_grad"].split(", ")
    for name, _ in net.named_parameters():
        assert (name in gradients) != any(fnmatchcase(name, pattern) for pattern in told), name
    expect.finish()


def tied_too(net: torch.nn.Module, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients under every name of their parameter."""
    names = dict(net.named_parameters(remove_duplicate=False))
    by_parameter = {id(names[name]): gradient for name, gradient in gradients.items()}
    return {name: by_parameter[id(item)] for name, item in names.items() if id(item) in by_parameter}


def check_clip_sampling(case: dict, arrays: Arrays, folder: Path) -> None:
    for frames, length, centre, seed, *wanted in arrays["rows"].tolist():
        assert sample_clip(length, centre, frames, random.Random(seed)) == wanted[:frames]
        assert wanted[frames:] == [-1] * len(wanted[frames:])


def check_transforms(case: dict, arrays: Arrays, folder: Path) -> None:
    expect, notes = Expect(case, arrays), case["notes"]
    grey, boxes = re.search(r"frames \+-(\d+) grey levels, boxes ([\de.-]+)", notes["tolerance"]).groups()

    def compare(stage: str, sample: ClipSample) -> None:
        assert np.abs(sample.frames.astype(int) - arrays[f"{stage}_frames"]).max() <= int(grey)
        np.testing.assert_allclose(sample.boxes, arrays[f"{stage}_boxes"], rtol=0, atol=float(boxes))
        np.testing.assert_array_equal(sample.masks, arrays[f"{stage}_masks"])
        for part in ("frames", "boxes", "masks"):
            expect(f"{stage}_{part}", getattr(sample, part))

    sample = make_sample(arrays["frames"], arrays["masks"].astype(bool), notes["caption_in"])
    compare("flip", flip(sample))
    assert flip(sample).text == flip(sample, whole_words=False).text == notes["caption_flipped"]
    resized = next(name for name in arrays if re.fullmatch(r"resize\d+_max\d+_frames", name)).removesuffix("_frames")
    short, longest = (int(number) for number in re.findall(r"\d+", resized))
    compare(resized, resize(sample, resize_size(*sample.size, short, longest)))
    window = re.search(r"top (\d+), left (\d+), h (\d+), w (\d+)", case["exercises"]).groups()
    checked = check(crop(sample, *map(int, window)))
    compare("check", checked)
    expect("check_valid", checked.valid)
    np.testing.assert_allclose(normalised_boxes(checked), arrays["norm_boxes"], rtol=0, atol=float(boxes))
    expect("norm_boxes", normalised_boxes(checked))
    expect.finish()


def check_metrics_a2d(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    gt, pred = arrays["gt"].astype(bool), arrays["pred"].astype(bool)
    result = a2d_metrics([str(number) for number in range(len(gt))], gt, pred, arrays["scores"])
    names = [*(f"P@{threshold}" for threshold in THRESHOLDS), "overall_iou", "mean_iou"]
    expect("metrics", [result[name] for name in names])
    expect.finish()


CHECKS: dict[str, Check] = {
    "clip_sampling": check_clip_sampling,
    "criterion": check_criterion,
    "metrics_a2d": check_metrics_a2d,
    "train_step": check_train_step,
    "transforms": check_transforms,
}
