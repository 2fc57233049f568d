"""Golden checks of CMA's network and inference; `CHECKS` maps the stem of a golden file to its check."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fill import fill_by_name
from golden_case import Expect
from torch import Tensor

from fewref.benchmark.metrics import contour_accuracy, region_similarity
from fewref.episodes.errors import read_json
from fewref.kernels.dynamic_mask import aligned_bilinear
from fewref.methods import query_inference
from fewref.methods.cma import inference
from fewref.methods.cma.affinity import SupportFeatures, SupportShot, support_transform
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.deformable import MSDeformAttn
from fewref.methods.layers.deformable_decoder import DeformableTransformer
from fewref.methods.layers.fpn import CrossModalFPN, VisionLanguageBlock
from fewref.methods.layers.fusion import VisionLanguageFusion
from fewref.methods.layers.mask_head import layer_masks
from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.position import sine_anchors, sine_positions_1d, sine_positions_2d
from fewref.methods.layers.query_net import select_queries
from fewref.methods.text import build_text_encoder

Arrays = Mapping[str, np.ndarray]
VARIANTS = {"CMA": "cma", "SELFCMA": "self", "BASECMA": "base"}


def inputs(arrays: Arrays) -> dict[str, Tensor]:
    """The case's `in_` arrays as tensors, without the prefix."""
    return {name[3:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("in_")}


def number(case: dict, pattern: str) -> int:
    """A whole number out of the case's description of its module; `#` in the pattern stands for the number."""
    return int(re.search(pattern.replace("#", r"(\d+)"), case["module"]).group(1))


def build_net(case: dict, folder: Path) -> CMANet:
    """The network that a case names (variant, use_dab), filled by name, in eval mode; shared between cases."""
    name = re.match(r"\w+", case["module"]).group()
    changed = re.search(r"except (\{.*?\})", case["module"])
    use_dab = json.loads(changed.group(1))["use_dab"] if changed else True
    text = read_json(folder / "cases.json")["conventions"]["text_config"]
    return _build_net(VARIANTS.get(name, "cma"), use_dab, json.dumps(text))


@functools.lru_cache(maxsize=1)
def _build_net(variant: str, use_dab: bool, text: str) -> CMANet:
    net = CMANet(
        backbone=build_backbone("resnet50"),
        text_encoder=build_text_encoder(json.loads(text)),
        variant=variant,
        use_dab=use_dab,
    )
    return fill_by_name(net).eval()


def padded_clip(frames: np.ndarray, size: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 (T,h,w,3) -> normalised, zero-padded float (1,T,3,H,W), and the padding mask (1,T,H,W)."""
    t, h, w, _ = frames.shape
    right, below = int(size[1]) - w, int(size[0]) - h
    clip = F.pad(normalise(torch.tensor(frames.transpose(0, 3, 1, 2))), (0, right, 0, below))
    padding = torch.ones(1, t, *map(int, size), dtype=torch.bool)
    padding[..., :h, :w] = False
    return clip[None], padding


def text_inputs(arrays: Arrays, clip: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention (1,L) of the query's or the support's sentence; all attended where not told."""
    ids = torch.from_numpy(arrays[f"in_{clip}_ids"])[None]
    attention = arrays.get(f"in_{clip}_attention")
    return ids, torch.ones_like(ids) if attention is None else torch.from_numpy(attention)[None]


def encoded_support(net: CMANet, arrays: Arrays) -> SupportFeatures:
    frames, padding = padded_clip(arrays["in_support_frames"], arrays["in_support_padded"])
    masks = torch.from_numpy(arrays["in_support_masks"]).float()[None]
    return net.encode_support(frames, padding, masks, net.encode_text(*text_inputs(arrays, "support")))


def forward(net: CMANet, arrays: Arrays) -> dict:
    """The whole network on a case's query and support, batch 1."""
    frames, padding = padded_clip(arrays["in_query_frames"], arrays["in_query_padded"])
    sizes = torch.tensor([arrays["in_query_frames"].shape[1:3]])
    text = net.encode_text(*text_inputs(arrays, "query"))
    return net(frames, padding, sizes, text, encoded_support(net, arrays))


@torch.no_grad()
def check_model(case: dict, arrays: Arrays, folder: Path) -> None:
    net, seen, expect = build_net(case, folder), {}, Expect(case, arrays)
    hooks = [
        net.transformer.register_forward_pre_hook(lambda _, args: seen.update(maps=args[0])),
        net.transformer.register_forward_hook(lambda _, args, output: seen.update(decoded=output)),
        net.pixel_decoder.mask_features.register_forward_hook(lambda _, args, output: seen.update(features=output)),
    ]
    output = forward(net, arrays)
    for hook in hooks:
        hook.remove()
    for name in ("pred_logits", "pred_boxes", "pred_masks", "reference_points"):
        expect(name, output[name])
    for layer, earlier in enumerate(output["aux_outputs"]):
        for name, value in earlier.items():
            expect(f"aux{layer}_{name}", value)
    for level in (2, 3):
        expect(f"fused{level}", seen["maps"][level])
    expect("hs_last", seen["decoded"].states[-1])
    expect("memory2", seen["decoded"].memory[2][:, ::8])
    expect("mask_features", seen["features"][:, ::32])
    expect.finish()


@torch.no_grad()
def check_episode_inference(case: dict, arrays: Arrays, folder: Path) -> None:
    net, expect = build_net(case, folder), Expect(case, arrays)
    short_side, chunk = int(arrays["in_short_side"]), int(arrays["in_chunk"])
    support = inference.encode_shot(
        net,
        arrays["in_support_frames"].transpose(0, 3, 1, 2),
        arrays["in_support_masks"] > 0,
        net.encode_text(*text_inputs(arrays, "support")),
        short_side,
    )
    frames = arrays["in_query_frames"].transpose(0, 3, 1, 2)
    text = net.encode_text(*text_inputs(arrays, "query"))
    (answer,) = inference.answer_queries(net, frames, [text], support, chunk=chunk, short_side=short_side)
    prob, size = inference.input_probabilities(answer), answer.size
    expect("input_size", size)
    expect("query", answer.queries)
    expect("scores", answer.scores)
    expect("prob", prob[::4])
    expect("saved", inference.masks_at(prob, frames.shape[2:]).byte())
    pred = inference.masks_at_input(prob).numpy()
    truth = inference.truth_at_input(torch.from_numpy(arrays["in_query_gt"]), size).numpy()
    j, f = region_similarity(pred, truth), contour_accuracy(pred, truth, tolerance=0.010)
    expect("J", j.mean())
    expect("F", f.mean())
    parts = [slice(start, start + chunk) for start in range(0, len(j), chunk)]
    expect("chunk_sums", [(j[part].sum(), f[part].sum(), len(j[part])) for part in parts])
    expect.finish()


def check_postprocess(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(arrays), Expect(case, arrays)
    size = tuple(given["size"].tolist())
    query = select_queries(given["pred_logits"][None])[0].item()
    prob = query_inference.probabilities(given["pred_masks"][:, query], size)
    pred, truth = inference.masks_at_input(prob), inference.truth_at_input(given["gt"], size)
    j = region_similarity(pred.numpy(), truth.numpy())
    f = contour_accuracy(pred.numpy(), truth.numpy(), tolerance=0.010)
    expect("query", query)
    expect("prob", prob)
    expect("pred_binary", pred.byte())
    expect("gt_binary", truth.byte())
    expect("J_sum", j.sum())
    expect("F_sum", f.sum())
    expect("J", [j.mean()])
    expect("F", [f.mean()])
    expect("saved", inference.masks_at(prob, given["gt"].shape[1:]).byte())
    expect.finish()


def check_jf_metric(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    tolerance = float(re.search(r"bound_th=([\d.]+)", case["module"]).group(1))
    expect("J", region_similarity(arrays["in_pred"], arrays["in_gt"]))
    expect("F", contour_accuracy(arrays["in_pred"], arrays["in_gt"], tolerance=tolerance))
    expect.finish()


@torch.no_grad()
def check_affinity(case: dict, arrays: Arrays, folder: Path) -> None:
    net, given, expect = build_net(case, folder), inputs(arrays), Expect(case, arrays)
    queries = [given[f"q{level}"][None] for level in range(4)]
    middle = len(given["support_mask"]) // 2
    maps = [given[f"s{level}"][None, middle : middle + 1] for level in range(4)]
    support = SupportFeatures([SupportShot(maps, [given["support_mask"][middle : middle + 1]])])
    prepared = net.prepare_support(support, [tuple(query.shape[-2:]) for query in queries])
    for level, fused in enumerate(net.affinity(queries, prepared)):
        expect(f"fused{level}", fused)
    expect.finish()


@torch.no_grad()
def check_text_path(case: dict, arrays: Arrays, folder: Path) -> None:
    net, given, expect = build_net(case, folder), inputs(arrays), Expect(case, arrays)
    text = net.encode_text(given["input_ids"], given["attention_mask"])
    expect("words", text.words)
    expect("word_mask", text.word_mask)
    expect("sentence", text.sentence)
    expect.finish()


@torch.no_grad()
def check_transformer(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(arrays), Expect(case, arrays)
    channels = number(case, "d_model=#")
    use_dab = "use_dab=True" in case["module"]
    levels = number(case, "# levels")
    transformer = DeformableTransformer(
        channels=channels,
        heads=number(case, "nhead=#"),
        encoder_layers=number(case, "# encoder layers"),
        decoder_layers=number(case, "# decoder layers"),
        ffn=number(case, "dim_feedforward=#"),
        levels=levels,
        points=number(case, "# points"),
        use_dab=use_dab,
    )
    fill_by_name(transformer).eval()
    maps, masks, positions = ([given[f"{kind}{i}"] for i in range(levels)] for kind in ("src", "mask", "pos"))
    embed = given["query_embed"]
    content = embed[:, :channels].expand(len(maps[0]), -1, -1) if use_dab else given["tgt"].flatten(0, 1)
    decoded = transformer(maps, masks, positions, content, embed[:, channels:] if use_dab else embed)
    expect("hs", decoded.states)
    expect("init_reference", decoded.initial)
    expect("inter_references", decoded.boxes)
    for level in range(3):
        expect(f"memory{level}", decoded.memory[level])
    expect.finish()


@torch.no_grad()
def check_ms_deform_attn(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(arrays), Expect(case, arrays)
    sizes = [number(case, f"{name}=#") for name in ("d_model", "n_levels", "n_heads", "n_points")]
    module = fill_by_name(MSDeformAttn(*sizes))
    shapes = [tuple(shape) for shape in given["shapes"].tolist()]
    for count in (2, 4):
        references = given[f"ref{count}"]
        locations, weights = module.samples(given["query"], references, shapes)
        expect(f"loc{count}", locations)
        expect("aw", weights)
        expect(f"y{count}", module(given["query"], references, given["value"], shapes, given["padding"]))
    expect.finish()


@torch.no_grad()
def check_vl_block(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(arrays), Expect(case, arrays)
    channels, reduction = number(case, r"Block\(#"), number(case, "sr_ratio=#")
    block = VisionLanguageBlock(channels, number(case, "nhead=#"), number(case, "dim_feedforward=#"), reduction)
    fill_by_name(block).eval()
    t, h, w = case["t_h_w"]

    def maps(name: str) -> Tensor:
        return given[name].transpose(0, 1).unflatten(1, (t, h, w)).permute(0, 1, 4, 2, 3).flatten(0, 1)

    words, places = given["memory"].transpose(0, 1), given["pos"].transpose(0, 1)
    out = block(maps("tgt"), maps("query_pos"), given["key_mask"].flatten(0, 1), words, places, given["memory_mask"])
    expect("out", out.permute(0, 2, 3, 1).reshape(len(words), t * h * w, -1).transpose(0, 1))
    expect.finish()


@torch.no_grad()
def check_fpn(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(arrays), Expect(case, arrays)
    widths = json.loads(re.search(r"feature_channels=(\[.*?\])", case["module"]).group(1))
    channels = number(case, "conv_dim=#")
    fpn = CrossModalFPN(tuple(widths), channels, number(case, "mask_dim=#"), ffn=number(case, "dim_feedforward=#"))
    fill_by_name(fpn).eval()
    maps = [given["feat0"], *(given[f"memory{level}"] for level in range(3))]
    masks, positions = ([given[f"{kind}{i}"] for i in range(4)] for kind in ("mask", "pos"))
    words, mask = given["text"], given["text_mask"]
    expect("mask_features", fpn(maps, masks, positions, words, sine_positions_1d(mask, channels), mask))
    expect.finish()


@torch.no_grad()
def check_fusion(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(arrays), Expect(case, arrays)
    module = fill_by_name(VisionLanguageFusion(number(case, "d_model=#"), number(case, "nhead=#"))).eval()
    tokens, words, places = (given[name].transpose(0, 1) for name in ("tgt", "memory", "pos"))
    expect("out", module(tokens, words, places, given["mask"]).transpose(0, 1))
    expect.finish()


def check_dynamic_mask_head(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(arrays), Expect(case, arrays)
    features, parameters = given["mask_features"], given["params"]
    b, t = features.shape[:2]
    frames = [given[name].unflatten(1, (t, -1)).flatten(0, 1) for name in ("params", "reference")]
    sizes, width = given["size"].repeat_interleave(t, 0), number(case, "dynamic_mask_channels=#")
    logits = layer_masks(features.flatten(0, 1), frames[0][None], frames[1][None], sizes, width)[0]
    expect("logits", logits.reshape(b, parameters.shape[1], *logits.shape[-2:]))
    expect.finish()


def check_aligned_bilinear(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    for name in [name for name in arrays if name.startswith("out_f")]:
        expect(name[4:], aligned_bilinear(torch.from_numpy(arrays["in_x"]), int(name[5:])))
    expect.finish()


def check_anchor_embedding(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(arrays), Expect(case, arrays)
    for count in (2, 4):
        channels = arrays[f"out_e{count}"].shape[-1] // count
        expect(f"e{count}", sine_anchors(given[f"p{count}"], channels))
    expect.finish()


def check_positions_1d(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    channels = int(re.search(r"Sine1D\((\d+)", case["module"]).group(1))
    expect("pos", sine_positions_1d(inputs(arrays)["mask"], channels).transpose(1, 2))
    expect.finish()


def check_positions_2d(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    expect("pos", sine_positions_2d(inputs(arrays)["mask"], 2 * number(case, "num_pos_feats=#")))
    expect.finish()


def check_support_transform(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    beta = float(re.search(r"transform\(x, ([\d.]+)\)", case["module"]).group(1))
    expect("y", support_transform(inputs(arrays)["x"], beta))
    expect.finish()


CHECKS = {
    "aligned_bilinear": check_aligned_bilinear,
    "anchor_sine_embed": check_anchor_embedding,
    "cma_affinity": check_affinity,
    "dynamic_mask_head": check_dynamic_mask_head,
    "episode_inference": check_episode_inference,
    "fpn_decoder": check_fpn,
    "fusion_module": check_fusion,
    "jf_metric": check_jf_metric,
    "model_": check_model,
    "ms_deform_attn": check_ms_deform_attn,
    "pos_sine1d": check_positions_1d,
    "pos_sine2d": check_positions_2d,
    "postprocess": check_postprocess,
    "support_transform": check_support_transform,
    "text_path": check_text_path,
    "transformer_": check_transformer,
    "vl_block": check_vl_block,
}
