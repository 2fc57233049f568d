"""Golden checks of ReferFormer as a whole and of what is made of its answers.

`CHECKS` maps the stem of a golden file to its check.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fill import fill_by_name
from golden_case import Expect
from parity_referformer_modules import Arrays, Check, inputs, sub_samples, with_slack
from torch import Tensor, nn

from fewref.benchmark.davis import BACKGROUND_SCORE, refdavis_merge
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.query_net import select_queries
from fewref.methods.query_inference import answer_clip, probabilities, resize, resize_short_side
from fewref.methods.referformer.net import ReferFormerNet, annotated_frames
from fewref.methods.referformer.postprocess import frame_answers, ranked_answers
from fewref.methods.text import build_text_encoder

# Upstream's options: the name of ours, and the value in cases that speak of defaults.
OPTIONS = {
    "num_classes": ("classes", 1),
    "num_queries": ("queries", 5),
    "enc_layers": ("encoder_layers", 4),
    "dec_layers": ("decoder_layers", 4),
    "dim_feedforward": ("ffn", 2048),
    "hidden_dim": ("hidden", 256),
    "nheads": ("heads", 8),
    "mask_dim": ("mask_dim", 256),
    "controller_layers": ("mask_layers", 3),
    "dynamic_mask_channels": ("mask_channels", 8),
    "with_box_refine": ("refined", True),
    "rel_coord": ("coordinates", True),
}
DEFAULTS = {"backbone": "resnet50", **{name: default for name, (_, default) in OPTIONS.items()}}
WITHOUT_COUNTERPART = ("binary", "size_divisibility", "model_input_shape", "defaults", "others")


def build_net(case: dict) -> ReferFormerNet:
    """The network that a case describes, filled by name, in eval mode; shared between cases."""
    options = {**DEFAULTS, **case["constructor"]}
    assert options.pop("num_feature_levels", 4) == 4
    for name in WITHOUT_COUNTERPART:
        options.pop(name, None)
    backbone, text = options.pop("backbone"), json.dumps(options.pop("roberta"))
    return _build_net(backbone, text, json.dumps({OPTIONS[name][0]: value for name, value in options.items()}))


@functools.lru_cache(maxsize=1)
def _build_net(backbone: str, text: str, options: str) -> ReferFormerNet:
    parts = {"backbone": build_backbone(backbone), "text_encoder": build_text_encoder(json.loads(text))}
    return fill_by_name(ReferFormerNet(**parts, **json.loads(options))).eval()


def padded_clips(arrays: Arrays, multiple: int) -> tuple[Tensor, Tensor]:
    """All clips of a case as one batch: float (B,T,3,H,W), normalised then padded with zeros, and the padding."""
    clips = [arrays[f"frames{clip}"] for clip in range(sum(name[:6] == "frames" for name in arrays))]
    height, width = (-(-max(clip.shape[axis] for clip in clips) // multiple) * multiple for axis in (1, 2))
    frames, padding = [], torch.ones(len(clips), len(clips[0]), height, width, dtype=torch.bool)
    for index, clip in enumerate(clips):
        h, w = clip.shape[1:3]
        frames.append(F.pad(normalise(torch.tensor(clip.transpose(0, 3, 1, 2))), (0, width - w, 0, height - h)))
        padding[index, :, :h, :w] = False
    return torch.stack(frames), padding


def forward(net: ReferFormerNet, case: dict, arrays: Arrays, sizes: Tensor) -> dict:
    """The whole network on the clips and sentences of a case, on the annotated frames alone where it tells them."""
    multiple = {**case["constructor"], **case["notes"]}["size_divisibility"]
    frames, padding = padded_clips(arrays, multiple)
    if "padded_input_shape" in case["notes"]:
        assert list(frames.shape) == case["notes"]["padded_input_shape"]
    text = net.encode_text(torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"]))
    maps = net.encode_query(frames, padding)
    if "valid_indices" in arrays:
        maps = annotated_frames(maps, torch.from_numpy(arrays["valid_indices"]))
    return net(maps, None, sizes, text)


@torch.no_grad()
def check_whole(case: dict, arrays: Arrays, folder: Path) -> None:
    net, seen, expect = build_net(case), {}, Expect(case, arrays)

    def backbone_maps(frames: Tensor) -> list[Tensor]:
        seen["maps"] = type(net).backbone_maps(net, frames)
        return seen["maps"]

    net.backbone_maps = backbone_maps
    hooks = [
        net.transformer.register_forward_pre_hook(lambda _, args: seen.update(src=args[0])),
        net.transformer.register_forward_hook(lambda _, args, output: seen.update(decoded=output)),
        net.pixel_decoder.mask_features.register_forward_hook(
            lambda _, args, output: seen.update(mask_features=output)
        ),
        net.controller.register_forward_hook(lambda _, args, output: seen.update(controller_last=output[-1])),
    ]
    output = forward(net, case, arrays, torch.from_numpy(arrays["sizes"]))
    del net.backbone_maps
    for hook in hooks:
        hook.remove()
    values = {name: output[name] for name in ("pred_logits", "pred_boxes", "pred_masks", "reference_points")}
    for layer, earlier in enumerate(output["aux_outputs"]):
        values |= {f"aux{layer}_{name}": value for name, value in earlier.items()}
    decoded = seen["decoded"]
    probes = {f"res{level}": value for level, value in enumerate(seen["maps"], start=2)}
    probes |= {f"src{level}": value for level, value in enumerate(seen["src"])}
    probes |= {f"memory{level}": value for level, value in enumerate(decoded.memory[:3])}
    probes |= {"hs": decoded.states, "init_reference": decoded.initial, "inter_references": decoded.boxes}
    probes |= {name: seen[name] for name in ("mask_features", "controller_last")}
    values |= {f"probe_{name}": value for name, value in probes.items()}
    told = {name for name, entry in case["arrays"].items() if entry["role"] != "input"}
    assert values.keys() == told
    for name, value in values.items():
        whole = list(value.shape) == case["arrays"][name]["shape"]
        expect(name, value if whole else sub_samples(value, len(arrays[name])))
    expect.finish()


@torch.no_grad()
def check_pipeline(case: dict, arrays: Arrays, folder: Path) -> None:
    net, expect, outputs = build_net(case), Expect(case, arrays), []
    t, _, height, width = case["constructor"]["model_input_shape"]
    ids = torch.from_numpy(arrays["input_ids"])
    text = net.encode_text(ids, torch.ones_like(ids))

    def ask(maps: object, sizes: Tensor) -> dict:
        outputs.append(net(maps, None, sizes, text))
        return net(maps, None, sizes, text, chosen=True)

    frames = arrays["frames"].transpose(0, 3, 1, 2)
    (answer,) = answer_clip(net, frames, [ask], chunk=t, short_side=min(height, width))
    assert answer.size == (height, width)
    assert len(outputs) == 1
    expect("pred_logits", outputs[0]["pred_logits"])
    expect("pred_boxes", outputs[0]["pred_boxes"])
    masks = outputs[0]["pred_masks"]
    expect("pred_masks_shape", masks.shape)
    expect("pred_masks_probe", sub_samples(masks, len(arrays["pred_masks_probe"])))
    expect("selected_query", answer.queries[0])
    with_slack(expect, "png", 255 * (probabilities(answer.logits, arrays["frames"].shape[1:3]) > 0.5).numpy())
    expect.finish()


def check_post_youtube(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(case, arrays), Expect(case, arrays)
    query = select_queries(given["pred_logits"])[0].item()
    expect("selected_query", query)
    masks = arrays["pred_masks"][0, :, query]
    prob = probabilities(torch.from_numpy(masks), tuple(arrays["orig_size"].tolist()))
    with_slack(expect, "png", 255 * (prob > case["constructor"]["threshold"]).numpy())
    expect.finish()


class Recorded(nn.Module):
    """Stands for a network whose answers to the frames of a clip, in order, are known."""

    def __init__(self, logits: Tensor, masks: Tensor) -> None:
        super().__init__()
        self.register_parameter("device", nn.Parameter(torch.zeros(1)))
        self.outputs, self.done = {"pred_logits": logits, "pred_masks": masks}, 0

    def encode_query(self, frames: Tensor, padding: Tensor) -> int:
        return frames.shape[1]

    def share(self, frames: int) -> None:
        """Nothing to do ahead of the sentences."""

    def ask(self, frames: int, sizes: Tensor) -> dict:
        part = slice(self.done, self.done + frames)
        self.done = part.stop
        logits, masks = (output[None, part] for output in self.outputs.values())
        chosen, scores = select_queries(logits)
        return {"chosen": chosen, "scores": scores, "pred_masks": masks[:, :, chosen[0]]}


def check_post_davis(case: dict, arrays: Arrays, folder: Path) -> None:
    expect, size = Expect(case, arrays), tuple(arrays["orig_size"].tolist())
    assert case["constructor"]["background"] == BACKGROUND_SCORE
    frames = np.zeros((arrays["pred_logits"].shape[1], 3, *size), np.uint8)
    at_size = []
    for logits, masks in zip(
        arrays["pred_logits"], torch.from_numpy(arrays["pred_masks"].astype(np.float32)), strict=True
    ):
        net = Recorded(torch.from_numpy(logits), masks)
        (answer,) = answer_clip(net, frames, [net.ask], chunk=case["constructor"]["clip_len"], short_side=min(size))
        at_size.append(resize(answer.logits, size).numpy())
    count = len(arrays["index_maps"])
    merged = [refdavis_merge(np.stack(at_size[annotator::count])) for annotator in range(count)]
    with_slack(expect, "index_maps", np.stack(merged))
    expect.finish()


def outputs_of(arrays: Arrays) -> dict[str, Tensor]:
    """The network's answers in a case; boxes, where it has none, are zero."""
    outputs = {name: torch.from_numpy(arrays[name]) for name in arrays if name.startswith("pred_")}
    return {"pred_boxes": torch.zeros(*outputs["pred_logits"].shape[:3], 4), **outputs}


def check_post_a2d(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    sizes, originals = torch.from_numpy(arrays["resized_sizes"]), arrays["orig_sizes"].tolist()
    for clip, answer in enumerate(frame_answers(outputs_of(arrays), sizes, originals)):
        expect(f"scores{clip}", answer.scores)
        expect(f"masks{clip}", answer.masks[:, None])
    expect.finish()


def check_post_coco(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    sizes, originals = torch.from_numpy(arrays["resized_sizes"]), arrays["orig_sizes"].tolist()
    for clip, answer in enumerate(ranked_answers(outputs_of(arrays), sizes, originals)):
        expect(f"scores{clip}", answer.scores)
        expect(f"boxes{clip}", answer.boxes)
        expect(f"masks{clip}", answer.masks[:, None])
        expect(f"labels{clip}", np.ones(len(answer.scores), np.int64))  # every answer is the object asked for
    expect.finish()


def check_preprocess(case: dict, arrays: Arrays, folder: Path) -> None:
    expect, options = Expect(case, arrays), case["constructor"]
    assert options["max_size"] is None
    image = normalise(torch.tensor(resize_short_side(arrays["image"].transpose(2, 0, 1)[None], options["short_side"])))
    expect("out_shape", image[0].shape)
    expect("out_probe", sub_samples(image, len(arrays["out_probe"])))
    expect.finish()


CHECKS: dict[str, Check] = {
    "pipeline_ytvos": check_pipeline,
    "post_a2d": check_post_a2d,
    "post_coco": check_post_coco,
    "post_davis": check_post_davis,
    "post_ytvos": check_post_youtube,
    "preprocess": check_preprocess,
    "whole": check_whole,
}
