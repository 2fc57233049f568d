"""Golden checks of TF2's whole network, its training step and its inference; see `CHECKS`."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from fill import fill_by_name
from golden_case import Expect
from parity_tf2_parts import SHORT_SIDE, compare_masks, given_masks
from torch import Tensor

from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.losses import criterion, stack_layers, stack_targets
from fewref.methods.layers.matcher import LossWeights, match, matching_cost
from fewref.methods.layers.pixels import normalise_padded
from fewref.methods.query_inference import resize_short_side
from fewref.methods.text import build_text_encoder
from fewref.methods.tf2 import inference
from fewref.methods.tf2.net import TF2Net
from fewref.methods.tf2.tracking import schedule, track

Arrays = Mapping[str, np.ndarray]
Check = Callable[[dict, Arrays, Path], None]
TERMS = ("ce", "bbox", "giou", "mask", "dice")
PREDICTIONS = ("pred_logits", "pred_boxes", "pred_masks")


def build_net(case: dict) -> TF2Net:
    """The default network with the text encoder that a case names, filled by name, in eval mode; kept for the next."""
    return _build_net(json.dumps(case["constructor"]["roberta"]))


@functools.lru_cache(maxsize=1)
def _build_net(text: str) -> TF2Net:
    net = TF2Net(backbone=build_backbone("resnet50"), text_encoder=build_text_encoder(json.loads(text)))
    return fill_by_name(net).eval()


def numbered(arrays: Arrays, prefix: str) -> list[np.ndarray]:
    """The arrays `prefix`0, `prefix`1, ... of a case."""
    count = sum(re.fullmatch(rf"{prefix}\d+", name) is not None for name in arrays)
    return [arrays[f"{prefix}{index}"] for index in range(count)]


def padded(clips: list[np.ndarray], multiple: int) -> tuple[Tensor, Tensor]:
    """Clips uint8 (T,h,w,3) -> normalised float (B,T,3,H,W), zero on padding, and padding bool (B,T,H,W)."""
    height, width = (math.ceil(max(clip.shape[axis] for clip in clips) / multiple) * multiple for axis in (1, 2))
    frames = torch.zeros(len(clips), len(clips[0]), 3, height, width, dtype=torch.uint8)
    padding = torch.ones(len(clips), len(clips[0]), height, width, dtype=torch.bool)
    for index, clip in enumerate(clips):
        h, w = clip.shape[1:3]
        frames[index, :, :, :h, :w] = torch.tensor(clip.transpose(0, 3, 1, 2))
        padding[index, :, :h, :w] = False
    return normalise_padded(frames, padding), padding


def forward(net: TF2Net, arrays: Arrays, multiple: int) -> dict:
    frames, padding = padded(numbered(arrays, "frames"), multiple)
    tracking, tracking_padding = padded(numbered(arrays, "pre_frames"), multiple)
    sizes = torch.tensor([clip.shape[1:3] for clip in numbered(arrays, "frames")])
    text = net.encode_text(*(torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask")))
    return net(frames, padding, sizes, text, tracking, tracking_padding)


def samples(tensor: Tensor, count: int) -> Tensor:
    """Evenly spread entries of a tensor in C order, as the cases' notes define them."""
    flat = tensor.flatten()
    return flat[torch.from_numpy(np.linspace(0, len(flat) - 1, count).astype(int))]


@torch.no_grad()
def check_whole(case: dict, arrays: Arrays, folder: Path) -> None:
    net, expect, seen = build_net(case), Expect(case, arrays), {}
    streams, maps = iter(("", "pre_")), iter(("", "pre_"))

    def backbone_maps(frames: Tensor) -> list[Tensor]:
        found, prefix = type(net).backbone_maps(net, frames), next(maps)
        seen.update({f"{prefix}res{stage}": found[stage - 2] for stage in (2, 3, 4, 5)})
        return found

    def encode(*args: object) -> object:
        prefix = next(streams)
        seen.update({f"{prefix}src{level}": item for level, item in enumerate(args[0])})
        return TF2Transformer.encode(net.transformer, *args)

    def decode(*args: object) -> object:
        decoded = TF2Transformer.decode(net.transformer, *args)
        seen.update(hs=decoded.states, inter_references=decoded.boxes)
        seen.update({f"memory{level}": item for level, item in enumerate(decoded.memory)})
        return decoded

    TF2Transformer = type(net.transformer)
    last = net.pixel_decoder.mask_features
    hook = last.register_forward_hook(lambda _, args, output: seen.update(mask_features=output))
    net.backbone_maps = backbone_maps
    net.transformer.encode, net.transformer.decode = encode, decode
    try:
        output = forward(net, arrays, case["notes"]["size_divisibility"])
    finally:
        del net.transformer.encode, net.transformer.decode, net.backbone_maps
        hook.remove()
    for name in (*PREDICTIONS, "reference_points"):
        expect(name, output[name])
    for layer, earlier in enumerate(output["aux_outputs"]):
        for name in PREDICTIONS:
            label = f"aux{layer}_{name}"
            expect(label, samples(earlier[name], arrays[label].size) if name == "pred_masks" else earlier[name])
    for name in [name for name in arrays if name.startswith("probe_")]:
        expect(name, samples(seen[name.removeprefix("probe_")], arrays[name].size))
    expect.finish()


def target(arrays: Arrays, clip: int) -> dict[str, Tensor]:
    return {name: torch.from_numpy(arrays[f"tgt{clip}_{name}"]) for name in ("boxes", "masks", "valid", "labels")}


def order(case: dict, name: str) -> list[str]:
    """The names of the scalars in one array, out of its description."""
    return case["arrays"][name]["meaning"].split(": ", 1)[1].split("; ")[0].split(", ")


def check_criterion(case: dict, arrays: Arrays, folder: Path) -> None:
    expect, told = Expect(case, arrays), case["constructor"]
    weights = LossWeights(**{name: told["weights"][f"loss_{name}"] for name in TERMS})
    matching = LossWeights(**{name: told["costs"]["cls" if name == "ce" else name] for name in TERMS})
    count = len({name.split("_")[0] for name in arrays if re.match(r"out\d+_", name)})
    layers = [
        {name: torch.from_numpy(arrays[f"out{layer}_{name}"]).requires_grad_() for name in PREDICTIONS}
        for layer in range(count)
    ]
    clips = sum(name.endswith("_boxes") and name.startswith("tgt") for name in arrays)
    targets = [target(arrays, clip) for clip in range(clips)]
    outputs = {**layers[-1], "aux_outputs": layers[:-1]}
    total, terms = criterion(outputs, targets, weights, matching, classify_valid=True)
    total.backward()
    found = {**terms, "total": total}
    for layer, predictions in enumerate(layers):
        found |= {f"grad{layer}_{name}_norm": value.grad.norm() for name, value in predictions.items()}
    expect("loss_values", torch.stack([found[name] for name in order(case, "loss_values")]))
    expect("match", matches(outputs, targets, matching))
    expect.finish()


def matches(outputs: dict, targets: list[dict[str, Tensor]], weights: LossWeights) -> Tensor:
    """Matched queries (layers,B), earlier layers first."""
    tubes = stack_layers(outputs)
    chosen = match(matching_cost(tubes, stack_targets(targets, tubes), weights, classify_valid=True))
    return torch.cat((chosen[1:], chosen[:1]))


def check_train_step(case: dict, arrays: Arrays, folder: Path) -> None:
    net, expect = build_net(case), Expect(case, arrays)
    net.training = True  # of the network alone: its parts stay in eval mode, that is without dropout
    try:
        outputs = forward(net, arrays, case["constructor"]["size_divisibility"])
        targets = [target(arrays, clip) for clip in range(len(arrays["input_ids"]))]
        total, terms = criterion(outputs, targets, classify_valid=True)
        total.backward()
        gradients = {name: p.grad.norm() for name, p in net.named_parameters() if p.grad is not None}
    finally:
        net.training = False
        net.zero_grad(set_to_none=True)
    found = {**terms, "total": total, "gradnorm:ALL": torch.stack(list(gradients.values())).norm()}
    found |= {f"gradnorm:{name}": value for name, value in gradients.items()}
    aliases = {f"gradnorm:transformer.decoder.{name}": value for name, value in gradients.items()}
    expect("values", torch.stack([(aliases | found)[name] for name in order(case, "values")]))
    expect("match", matches(outputs, targets, LossWeights()))
    for name in ("pred_logits", "pred_boxes"):
        expect(name, outputs[name])
    expect.finish()


@torch.no_grad()
def check_tracking_model(case: dict, arrays: Arrays, folder: Path) -> None:
    net, expect, outputs, trace = build_net(case), Expect(case, arrays), [], []
    frames, key = arrays["frames"].transpose(0, 3, 1, 2), int(arrays["key"])
    ids = torch.from_numpy(arrays["input_ids"])
    text = net.encode_text(ids, torch.from_numpy(arrays.get("attention_mask", np.ones_like(ids))))
    resized = resize_short_side(frames, SHORT_SIDE)
    streams = {
        frame: inference.encode(net, resized[[frame]], text) for frame, _ in schedule(len(frames), key, "released")
    }
    size = resized.shape[-2:]
    height, width = (math.ceil(side / 4) for side in size)
    answer = inference.TrackedClip(torch.empty(len(frames), height, width), torch.empty(len(frames)), size, key)
    frame_tracker = inference.FrameTracker(net, frames, streams, text, SHORT_SIDE, answer)

    def tracker(frame: int, last: int, image: np.ndarray) -> np.ndarray:
        trace.append((frame, last))
        return frame_tracker(frame, last, image)

    def decode(*args: object, **options: object) -> dict:
        outputs.append(TF2Net.decode(net, *args))
        return TF2Net.decode(net, *args, **options)

    net.decode = decode
    try:
        found = track(frames, given_masks(arrays["init"], key), key, tracker, "released")
    finally:
        del net.decode
    expect("trace", np.array(trace, int).reshape(-1, 2))
    expect("pred_logits", torch.cat([output["pred_logits"][:, 0] for output in outputs]))
    expect("pred_boxes", torch.cat([output["pred_boxes"][:, 0] for output in outputs]))
    count = arrays["pred_masks_probe"].shape[1]
    expect("pred_masks_probe", torch.stack([samples(output["pred_masks"], count) for output in outputs]))
    compare_masks(expect, "final", found)
    expect.finish()


CHECKS: dict[str, Check] = {
    "criterion": check_criterion,
    "tracking_model": check_tracking_model,
    "train_step": check_train_step,
    "whole": check_whole,
}
