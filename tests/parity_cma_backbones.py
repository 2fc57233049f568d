"""Golden checks of CMA's backbones: the ResNet joiner with its masks and positions, Swin, Video-Swin.

`CHECKS` maps the stem of a golden file to its check; `test_parity_cma.py` runs them over every case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from fill import fill_by_name
from golden_case import Expect
from torch import nn

from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone

Check = Callable[[dict, Mapping[str, np.ndarray], Path], None]

# Options of upstream's constructors that ours does not have, with the only value that it stands for, ...
FIXED = {
    "qkv_bias": True,
    "qk_scale": None,
    "ape": False,
    "patch_norm": True,
    "out_indices": [0, 1, 2, 3],
    "patch_size": [1, 4, 4],
}
# ... and those without effect in evaluation.
INERT = ("drop_rate", "attn_drop_rate", "use_checkpoint")
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def thin(full: torch.Tensor, expected: np.ndarray) -> torch.Tensor:
    """Every n-th channel, as many as the golden array kept."""
    return full[:, :: full.shape[1] // expected.shape[1]]


def constructor(case: dict) -> dict:
    """The options that a case states as JSON inside its `module` text, without those that are fixed here."""
    text = case["module"]
    options = json.loads(text[text.index("{") : text.rindex("}") + 1])
    for name in FIXED.keys() & options.keys():
        assert options.pop(name) == FIXED[name], f"{case['file']}: {name} is supported as {FIXED[name]} only"
    return {name: value for name, value in options.items() if name not in INERT}


def normalised(frames: np.ndarray, size: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (T,H,W,3) -> float (1,T,3,*size), normalised then padded with zeros, and the mask bool (1,T,*size)."""
    t, h, w = frames.shape[:3]
    padded = np.zeros((1, t, *size, 3), np.float32)
    padded[0, :, :h, :w] = (frames.astype(np.float32) / 255 - MEAN) / STD
    mask = np.ones((1, t, *size), bool)
    mask[0, :, :h, :w] = False
    return torch.from_numpy(padded.transpose(0, 1, 4, 2, 3).copy()), torch.from_numpy(mask)


@torch.no_grad()
def check_resnet_joiner(case: dict, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    name = re.search(r"build_backbone\((\w+)\)", case["module"])[1]
    text = nn.Identity()  # the joiner reads no text
    text.config = SimpleNamespace(hidden_size=8)
    network = CMANet(backbone=build_backbone(name), text_encoder=text, encoder_layers=1, decoder_layers=1, ffn=8).eval()
    fill_by_name(network.backbone)
    frames, mask = normalised(arrays["in_frames"], arrays["in_size"])
    maps = network.backbone_maps(frames)
    query = network.encode_query(frames, mask)
    expect = Expect(case, arrays)
    assert torch.equal(query.stride4, maps[0])
    for level in range(4):
        expect(f"feat{level}", thin(maps[level], arrays[f"out_feat{level}"]))
        expect(f"mask{level}", query.masks[level])
        expect(f"pos{level}", thin(query.positions[level][:1], arrays[f"out_pos{level}"]))
    expect.finish()


@torch.no_grad()
def check_swin(case: dict, arrays: Mapping[str, np.ndarray], folder: Path, name: str = "swin_t_p4w7") -> None:
    backbone = build_backbone(name, **constructor(case)).eval()
    fill_by_name(backbone)
    frames = torch.from_numpy(arrays["in_frames"])
    expect = Expect(case, arrays)
    for level, actual in enumerate(backbone(frames, clip_frames=len(frames))):
        expect(f"feat{level}", actual)
    expect.finish()


def check_video_swin(case: dict, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    check_swin(case, arrays, folder, "video_swin_t_p4w7")


CHECKS: dict[str, Check] = {
    "resnet50_joiner": check_resnet_joiner,
    "swin_tiny": check_swin,
    "video_swin_tiny": check_video_swin,
}
