"""Golden checks of CMA's backbones: the ResNet joiner with its masks and positions, Swin, Video-Swin.

`CHECKS` maps the stem of a golden file to its check; `test_parity_cma.py` runs them over every case.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone

Check = Callable[[dict, Mapping[str, np.ndarray], Path], None]

SPEC = importlib.util.spec_from_file_location("fill", Path(__file__).parent / "golden/fill.py")
fill = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fill)

# Options of upstream's constructors that ours does not have, with the only value that it stands for.
FIXED = {
    "qkv_bias": True,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "ape": False,
    "patch_norm": True,
    "out_indices": [0, 1, 2, 3],
    "use_checkpoint": False,
    "patch_size": [1, 4, 4],
}
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def compare(case: dict, name: str, actual: torch.Tensor, expected: np.ndarray) -> None:
    """Hold one output against its golden array at that array's stated tolerance."""
    label = f"{case['file']}: {name}"
    tolerance = case["arrays"][name].get("tolerance", case["tolerance"])
    actual = actual.detach().numpy()
    assert actual.shape == expected.shape, f"{label} has shape {actual.shape}, not {expected.shape}"
    if tolerance == "exact":
        np.testing.assert_array_equal(actual, expected, err_msg=label)
    else:
        np.testing.assert_allclose(actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=label)


def thin(full: torch.Tensor, expected: np.ndarray) -> torch.Tensor:
    """Every n-th channel, as many as the golden array kept."""
    return full[:, :: full.shape[1] // expected.shape[1]]


def constructor(case: dict) -> dict:
    """The options that a case states as JSON inside its `module` text, without those that are fixed here."""
    text = case["module"]
    options = json.loads(text[text.index("{") : text.rindex("}") + 1])
    for name in FIXED.keys() & options.keys():
        assert options.pop(name) == FIXED[name], f"{case['file']}: {name} is supported as {FIXED[name]} only"
    return options


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
    text = nn.Identity()  # the joiner reads no text
    text.config = SimpleNamespace(hidden_size=8)
    network = CMANet(
        backbone=build_backbone("resnet50"), text_encoder=text, encoder_layers=1, decoder_layers=1, ffn=8
    ).eval()
    fill.fill_by_name(network.backbone)
    frames, mask = normalised(arrays["in_frames"], arrays["in_size"])
    maps = network.backbone[0].body(frames[0], clip_frames=frames.shape[1])
    query = network.encode_query(frames, mask)
    assert torch.equal(query.stride4, maps[0])
    for level in range(4):
        feature, place = arrays[f"out_feat{level}"], arrays[f"out_pos{level}"]
        compare(case, f"out_feat{level}", thin(maps[level], feature), feature)
        compare(case, f"out_mask{level}", query.masks[level], arrays[f"out_mask{level}"])
        compare(case, f"out_pos{level}", thin(query.positions[level][:1], place), place)


@torch.no_grad()
def check_swin(case: dict, arrays: Mapping[str, np.ndarray], folder: Path, name: str = "swin_t_p4w7") -> None:
    backbone = build_backbone(name, **constructor(case)).eval()
    fill.fill_by_name(backbone)
    frames = torch.from_numpy(arrays["in_frames"])
    for level, actual in enumerate(backbone(frames, clip_frames=len(frames))):
        compare(case, f"out_feat{level}", actual, arrays[f"out_feat{level}"])


def check_video_swin(case: dict, arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    check_swin(case, arrays, folder, "video_swin_t_p4w7")


CHECKS: dict[str, Check] = {
    "resnet50_joiner": check_resnet_joiner,
    "swin_tiny": check_swin,
    "video_swin_tiny": check_video_swin,
}
