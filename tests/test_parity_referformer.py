"""ReferFormer against golden numbers of the authors' code: every case of cases.json, at the tolerance stated there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity_referformer_modules
import parity_referformer_training
import parity_referformer_whole
import pytest
import torch
from golden_case import golden_folder, load_cases

from fewref.episodes.errors import read_json
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.referformer.net import ReferFormerNet
from fewref.methods.text import build_text_encoder

GOLDEN = golden_folder("referformer")
CHECKS = {**parity_referformer_modules.CHECKS, **parity_referformer_whole.CHECKS, **parity_referformer_training.CHECKS}
TABLES = read_json(GOLDEN / "state_dict_names.json")
ROBERTA_BASE = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
BODY = "backbone.0.body."
PARAMETERS = {"swin_l_p4w7": 194_998_164, "video_swin_t_p4w7": 27_844_326, "video_swin_b_p4w7": 87_630_792}


@pytest.mark.parametrize("case", load_cases(GOLDEN), ids=lambda case: Path(case["file"]).stem)
def test_case(case: dict) -> None:
    stem = Path(case["file"]).stem
    names = [name for name in CHECKS if stem.startswith(name)]
    assert names, f"{case['file']} has no check"
    with np.load(GOLDEN / case["file"]) as arrays:
        CHECKS[max(names, key=len)](case, dict(arrays), GOLDEN)


def full_network(backbone: str, **options: object) -> ReferFormerNet:
    """A network of the published size with RoBERTa-base, without memory for its values."""
    with torch.device("meta"):
        text = build_text_encoder(ROBERTA_BASE)
        return ReferFormerNet(backbone=build_backbone(backbone), text_encoder=text, **options)


def wanted_names(backbone: str | None) -> dict[str, str]:
    """Names and shapes of upstream's state dict; backbone: one of the tables, None for ResNet-50."""
    wanted = {**TABLES["model"], **TABLES["text_encoder"]}
    if backbone is None:
        return wanted
    wanted = {name: shape for name, shape in wanted.items() if not name.startswith("backbone.")}
    table = TABLES["backbone"][backbone]
    for stage in range(4):
        width = table.get(f"{BODY}layers.{stage}.blocks.0.norm1.weight")
        if width and stage == 0:
            wanted["pixel_decoder.adapter_1.weight"] = f"256x{width}x1x1"
        elif width:
            wanted[f"input_proj.{stage - 1}.0.weight"] = f"256x{width}x1x1"
            wanted["input_proj.3.0.weight"] = f"256x{width}x3x3"
    return wanted | table


def names_of(net: ReferFormerNet) -> dict[str, str]:
    return {name: "x".join(map(str, tensor.shape)) for name, tensor in net.state_dict().items()}


def test_state_dict() -> None:
    net = full_network("resnet50")
    found, wanted = names_of(net), wanted_names(None)
    assert found == wanted
    assert [name for name in found if not name.startswith("text_encoder.")] == list(TABLES["model"])
    assert [name for name in found if name.startswith("text_encoder.")] == list(TABLES["text_encoder"])
    sizes = {name: p.numel() for name, p in net.named_parameters() if not name.startswith("text_encoder.")}
    assert sum(sizes.values()) == 51_616_575
    assert sum(sizes[name] for name, p in net.named_parameters() if p.requires_grad) == 51_394_175
    assert sum(p.numel() for p in net.text_encoder.parameters()) == 124_645_632


@pytest.mark.parametrize("backbone", sorted(TABLES["backbone"]))
def test_state_dict_of_other_backbones(backbone: str) -> None:
    net = full_network(backbone)
    assert names_of(net) == wanted_names(backbone)
    if backbone in PARAMETERS:
        assert sum(p.numel() for p in net.backbone.parameters()) == PARAMETERS[backbone]
    if "swin" in backbone:
        assert all(p.requires_grad for p in net.backbone.parameters())


def test_state_dict_without_refinement() -> None:
    net = full_network("resnet50", refined=False, classes=65)
    wanted = {name: shape for name, shape in wanted_names(None).items() if "decoder.bbox_embed" not in name}
    wanted |= {f"class_embed.{layer}.weight": "65x256" for layer in range(4)}
    wanted |= {f"class_embed.{layer}.bias": "65" for layer in range(4)}
    assert names_of(net) == wanted
    assert net.class_embed[0] is net.class_embed[3]
    assert net.bbox_embed[0] is net.bbox_embed[3]
