"""CMA against golden numbers of the authors' code: every case of cases.json, at the tolerance stated there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity_cma_backbones
import parity_cma_network
import parity_cma_training
import pytest
import torch
from golden_case import golden_folder, load_cases

from fewref.episodes.errors import read_json
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.text import build_text_encoder

GOLDEN = golden_folder("cma")
CHECKS = {**parity_cma_network.CHECKS, **parity_cma_backbones.CHECKS, **parity_cma_training.CHECKS}
ROBERTA_BASE = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


@pytest.mark.parametrize("case", load_cases(GOLDEN), ids=lambda case: Path(case["file"]).stem)
def test_case(case: dict) -> None:
    stem = Path(case["file"]).stem
    names = [name for name in CHECKS if stem.startswith(name)]
    assert names, f"{case['file']} has no check"
    with np.load(GOLDEN / case["file"]) as arrays:
        CHECKS[max(names, key=len)](case, dict(arrays), GOLDEN)


@pytest.mark.parametrize("block", ["cma", "cma_nodab", "self_nodab", "base_nodab"])
def test_state_dict(block: str) -> None:
    tables = read_json(GOLDEN / "state_dict.json")
    wanted = dict(tables["cma"])
    if block != "cma":
        for name in tables[block]["removed"]:
            del wanted[name]
        wanted |= tables[block]["added"] | tables[block]["changed"]
    variant, _, nodab = block.partition("_")
    with torch.device("meta"):
        net = CMANet(
            backbone=build_backbone("resnet50"),
            text_encoder=build_text_encoder(ROBERTA_BASE),
            variant=variant,
            use_dab=not nodab,
        )
    state = net.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == wanted
    if block == "cma":
        assert list(state) == list(wanted)
        assert sum(p.numel() for p in net.parameters()) == 178_393_809
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 30_293_265
