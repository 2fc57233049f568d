"""Golden checks of ReferFormer's modules, one by one; `CHECKS` maps the stem of a golden file to its check."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fill import fill_by_name
from golden_case import Expect
from parity_cma_backbones import FIXED, INERT
from torch import Tensor, nn

from fewref.kernels.dynamic_mask import aligned_bilinear, dynamic_mask_head
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.deformable import DeformableEncoderLayer, MSDeformAttn
from fewref.methods.layers.deformable_decoder import DeformableDecoderLayer, DeformableTransformer
from fewref.methods.layers.fpn import CrossModalFPN, VisionLanguageBlock
from fewref.methods.layers.fusion import VisionLanguageFusion
from fewref.methods.layers.mask_head import build_controller, layer_masks
from fewref.methods.layers.mlp import FeatureResizer
from fewref.methods.layers.position import sine_positions_1d, sine_positions_2d
from fewref.methods.text import build_text_encoder, encode_sentences

Arrays = Mapping[str, np.ndarray]
Check = Callable[[dict, Arrays, Path], None]


def inputs(case: dict, arrays: Arrays) -> dict[str, Tensor]:
    """The case's input arrays by name as tensors; masks, stored as 0/1, as bool."""
    told = {name: entry["role"] for name, entry in case["arrays"].items()}
    given = {name: torch.from_numpy(array) for name, array in arrays.items() if told[name] == "input"}
    return {name: item.bool() if item.dtype == torch.uint8 and "mask" in name else item for name, item in given.items()}


def sub_samples(values: Tensor | np.ndarray, count: int) -> np.ndarray:
    """`count` values spread evenly over the flat array, or all where it has no more."""
    flat = np.asarray(values.detach() if isinstance(values, Tensor) else values).reshape(-1)
    if len(flat) <= count:
        return flat
    return flat[np.floor(np.linspace(0, len(flat) - 1, count)).astype(np.int64)]


def told_number(case: dict, name: str, pattern: str) -> int:
    """A whole number out of the description of an array; `#` in the pattern stands for it."""
    return int(re.search(pattern.replace("#", r"(\d+)"), case["arrays"][name]["meaning"])[1])


def with_slack(expect: Expect, name: str, actual: object) -> None:
    """Compare a mask, of which the share of pixels that the case's notes allow may differ."""
    allowed = re.search(r"<= ([\d.]+) % differing", str(expect.case.get("notes", "")))
    actual, wanted = np.asarray(actual), expect.arrays[name]
    expect.left.discard(name)
    assert actual.shape == wanted.shape, f"{name} has shape {actual.shape}, not {wanted.shape}"
    share = 100 * float(np.mean(actual != wanted))
    assert share <= (float(allowed[1]) if allowed else 0), f"{expect.case['file']}: {name}: {share} % of pixels differ"


def check_positions_1d(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    positions = sine_positions_1d(inputs(case, arrays)["mask"], case["constructor"]["num_pos_feats"])
    expect("pos", positions.transpose(1, 2))
    expect.finish()


def check_positions_2d(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    expect("pos", sine_positions_2d(inputs(case, arrays)["mask"], 2 * case["constructor"]["num_pos_feats"]))
    expect.finish()


def shapes_of(given: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    return [tuple(shape) for shape in given["spatial_shapes"].tolist()]


@torch.no_grad()
def check_ms_deform_attn(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, options = inputs(case, arrays), Expect(case, arrays), case["constructor"]
    module = fill_by_name(MSDeformAttn(*(options[name] for name in ("d_model", "n_levels", "n_heads", "n_points"))))
    query, references, shapes = given["query"], given["reference_points"], shapes_of(given)
    locations, weights = module.samples(query, references, shapes)
    expect("sampling_locations", locations)
    expect("attention_weights", weights)
    expect("output", module(query, references, given["src"], shapes, given["padding_mask"]))
    expect.finish()


def layer_options(case: dict) -> tuple:
    names = ("d_model", "n_heads", "d_ffn", "dropout", "n_levels", "n_points")
    return tuple(case["constructor"][name] for name in names)


@torch.no_grad()
def check_encoder_layer(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(case, arrays), Expect(case, arrays)
    layer = fill_by_name(DeformableEncoderLayer(*layer_options(case))).eval()
    references, padding = given["reference_points"], given["padding_mask"]
    expect("output", layer(given["src"], given["pos"], references, shapes_of(given), padding))
    expect.finish()


@torch.no_grad()
def check_decoder_layer(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(case, arrays), Expect(case, arrays)
    layer = fill_by_name(DeformableDecoderLayer(*layer_options(case))).eval()
    queries = (given["tgt"], given["query_pos"], given["reference_points"])
    expect("output", layer(*queries, given["src"], shapes_of(given), given["padding_mask"]))
    expect.finish()


@torch.no_grad()
def check_transformer(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, options = inputs(case, arrays), Expect(case, arrays), case["constructor"]
    levels = options["num_feature_levels"]
    transformer = DeformableTransformer(
        channels=options["d_model"],
        heads=options["nhead"],
        encoder_layers=options["num_encoder_layers"],
        decoder_layers=options["num_decoder_layers"],
        ffn=options["dim_feedforward"],
        levels=levels,
        points=options["n_points"],
        use_dab=False,
        refined=arrays["inter_references"].shape[-1] == 4,
    )
    fill_by_name(transformer).eval()
    maps, masks, positions = ([given[f"{kind}{i}"] for i in range(levels)] for kind in ("src", "mask", "pos"))
    decoded = transformer(maps, masks, positions, given["tgt"].flatten(0, 1), given["query_embed"])
    expect("hs", decoded.states)
    expect("init_reference", decoded.initial)
    expect("inter_references", decoded.boxes)
    for level in range(levels - 1):
        expect(f"memory{level}", decoded.memory[level])
    expect.finish()


@torch.no_grad()
def check_fusion(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, options = inputs(case, arrays), Expect(case, arrays), case["constructor"]
    module = fill_by_name(VisionLanguageFusion(options["d_model"], options["nhead"])).eval()
    tokens, words, places = (given[name].transpose(0, 1) for name in ("tgt", "memory", "pos"))
    expect("output", module(tokens, words, places, given["memory_mask"]).transpose(0, 1))
    expect.finish()


@torch.no_grad()
def check_vl_block(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, options = inputs(case, arrays), Expect(case, arrays), case["constructor"]
    sizes = [options[name] for name in ("d_model", "nhead", "dim_feedforward", "sr_ratio")]
    block = fill_by_name(VisionLanguageBlock(*sizes)).eval()
    grid = tuple(options[name] for name in "thw")

    def maps(name: str) -> Tensor:
        return given[name].transpose(0, 1).unflatten(1, grid).permute(0, 1, 4, 2, 3).flatten(0, 1)

    words, places = given["memory"].transpose(0, 1), given["pos"].transpose(0, 1)
    mask = given["tgt_mask"].unflatten(1, grid).flatten(0, 1)
    out = block(maps("tgt"), maps("query_pos"), mask, words, places, given["memory_mask"])
    expect("output", out.permute(0, 2, 3, 1).reshape(len(words), -1, out.shape[1]).transpose(0, 1))
    expect.finish()


@torch.no_grad()
def check_pixel_decoder(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, options = inputs(case, arrays), Expect(case, arrays), case["constructor"]
    channels = options["conv_dim"]
    sizes = (tuple(options["feature_channels"]), channels, options["mask_dim"])
    decoder = fill_by_name(CrossModalFPN(*sizes, ffn=options["dim_feedforward"])).eval()
    maps = [given["res2"], *(given[f"memory{level}"] for level in range(3))]
    masks, positions = ([given[f"{kind}{i}"] for i in range(4)] for kind in ("mask", "pos"))
    words, mask = given["text"], given["text_mask"]
    out = decoder(maps, masks, positions, words, sine_positions_1d(mask, channels), mask)
    expect("mask_features", out)
    expect.finish()


def check_dynamic_mask_head(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, options = inputs(case, arrays), Expect(case, arrays), case["constructor"]
    features, parameters = given["mask_features"].float(), given["params"]
    b, t = features.shape[:2]
    by_frame = [given[name].unflatten(1, (t, -1)).flatten(0, 1) for name in ("params", "reference_points")]
    coordinates, shape = options["rel_coord"], (options["dynamic_mask_channels"], options["controller_layers"])
    assert options["mask_feat_stride"] == 4
    controller = build_controller(8, options["mask_dim"], *shape, coordinates)
    assert controller.layers[-1].out_features == parameters.shape[-1]
    boxes = by_frame[1][None] if coordinates else None
    logits = layer_masks(
        features.flatten(0, 1), by_frame[0][None], boxes, given["sizes"].repeat_interleave(t, 0), *shape
    )
    expect("mask_logits", logits[0].reshape(b, parameters.shape[1], *logits.shape[-2:]))
    expect.finish()


def check_aligned_bilinear(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    for name in [name for name in arrays if re.fullmatch(r"x\d+", name)]:
        expect(name, aligned_bilinear(torch.from_numpy(arrays["x"]), int(name[1:])))
    h, w, stride = (told_number(case, "locations", f"{name}=#") for name in ("h", "w", "stride"))
    expect("locations", cell_centres(h, w, stride))
    expect.finish()


def cell_centres(h: int, w: int, stride: int) -> Tensor:
    """Where the mask head sees the cells of a map, (h*w,2) as x, y: a head of identities, with two queries at the
    origin which read the first and the second relative coordinate, both negated."""
    first, second = [0, -1, 0, 0, 0, -1], [1, 0, 0, 1]
    parameters = torch.tensor([first + second + last + [0] * 5 for last in ([1, 0], [0, 1])]).float()
    logits = dynamic_mask_head(torch.zeros(1, 1, h, w), parameters[None], torch.zeros(1, 2, 2), stride=stride, width=2)
    return logits[0].flatten(1).T


@torch.no_grad()
def check_text_path(case: dict, arrays: Arrays, folder: Path) -> None:
    expect, options = Expect(case, arrays), case["constructor"]
    encoder = build_text_encoder(options["roberta"])
    resizer = FeatureResizer(encoder.config.hidden_size, options["output_feat_size"], dropout=0.1)
    fill_by_name(nn.ModuleDict({"text_encoder": encoder, "resizer": resizer})).eval()
    ids, attention = torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])
    words, pooled = encode_sentences(encoder, ids, attention, frozen=True)
    for name, value in (("last_hidden_state", words), ("pooler_output", pooled)):
        expect(name, value[..., :: told_number(case, name, "every #")])
    expect("text_mask", attention != 1)
    expect("word_features", resizer(words))
    expect("sentence_features", resizer(pooled))
    expect.finish()


def wrapped(backbone: nn.Module, *names: str) -> nn.Module:
    """A backbone in eval mode, filled as if it stood behind these names."""
    module = backbone
    for name in reversed(names):
        module = nn.ModuleDict({name: module})
    fill_by_name(module)
    return backbone.eval()


def resized_mask(mask: Tensor, level: Tensor) -> Tensor:
    """Padding (N,H,W) at the size of a backbone map."""
    return F.interpolate(mask[:, None].float(), level.shape[-2:])[:, 0].bool()


@torch.no_grad()
def check_resnet(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, options = inputs(case, arrays), Expect(case, arrays), case["constructor"]
    backbone = wrapped(build_backbone(options["name"]), "0", "body")
    maps = backbone(given["frames"].flatten(0, 1), clip_frames=given["frames"].shape[1])
    for level, features in enumerate(maps, start=2):
        mask = resized_mask(given["mask"].flatten(0, 1), features)
        expect(f"mask{level}", mask)
        positions = sine_positions_2d(mask, options["hidden_dim"])
        for name, value in ((f"res{level}_probe", features), (f"pos{level}_probe", positions)):
            expect(name, sub_samples(value, told_number(case, name, "# sub-samples")))
        name = f"res{level}_absmean"
        expect(name, features.abs().mean((0, 2, 3))[:: told_number(case, name, "every #th channel")])
    expect.finish()


def backbone_options(case: dict) -> dict:
    """Arguments of our constructors, from those of upstream's."""
    options = dict(case["constructor"])
    for name in FIXED.keys() & options.keys():
        assert options.pop(name) == FIXED[name], f"{case['file']}: {name} is supported as {FIXED[name]} only"
    return {name: value for name, value in options.items() if name not in INERT}


@torch.no_grad()
def check_swin(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect = inputs(case, arrays), Expect(case, arrays)
    backbone = wrapped(build_backbone("swin_t_p4w7", **backbone_options(case)), "body")
    for level, features in enumerate(backbone(given["frames"])):
        expect(f"out{level}", features)
        expect(f"mask{level}", resized_mask(given["mask"], features))
    expect.finish()


@torch.no_grad()
def check_video_swin(case: dict, arrays: Arrays, folder: Path) -> None:
    expect, options = Expect(case, arrays), backbone_options(case)
    clip_frames = options.pop("num_frames")
    backbone = wrapped(build_backbone("video_swin_t_p4w7", **options))
    for level, features in enumerate(backbone(torch.from_numpy(arrays["frames"]), clip_frames)):
        expect(f"out{level}", features)
    expect.finish()


CHECKS: dict[str, Check] = {
    "aligned_bilinear": check_aligned_bilinear,
    "backbone_resnet": check_resnet,
    "decoder_layer": check_decoder_layer,
    "deformable_transformer": check_transformer,
    "dynamic_mask_head": check_dynamic_mask_head,
    "encoder_layer": check_encoder_layer,
    "fusion_module": check_fusion,
    "msdeform_attn": check_ms_deform_attn,
    "pixel_decoder": check_pixel_decoder,
    "pos_sine1d": check_positions_1d,
    "pos_sine2d": check_positions_2d,
    "swin2d": check_swin,
    "text_path": check_text_path,
    "video_swin": check_video_swin,
    "vl_block": check_vl_block,
}
