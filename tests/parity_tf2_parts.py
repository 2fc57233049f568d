"""Golden checks of TF2's decoder, pairing and tracking loop; `CHECKS` maps the stem of a golden file to its check."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fill import fill_by_name
from golden_case import Expect
from torch import Tensor

from fewref.methods.layers.deformable_decoder import DeformableDecoderLayer, DeformableTransformer, Memory
from fewref.methods.layers.pixels import normalise
from fewref.methods.layers.query_net import select_queries
from fewref.methods.query_inference import probabilities, resize_short_side
from fewref.methods.referformer.clip_sampling import sample_clip
from fewref.methods.tf2.pairing import keep_object, neighbours
from fewref.methods.tf2.tracking import given_frames, schedule, track

Arrays = Mapping[str, np.ndarray]
Check = Callable[[dict, Arrays, Path], None]
ABSENT = 7  # where a golden file has no mask of a frame
SHORT_SIDE = 360


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Every array as a tensor, flags and masks as bool."""
    made = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    return {name: value.bool() if "mask" in name else value for name, value in made.items()}


def shapes_of(array: Tensor) -> list[tuple[int, int]]:
    return [tuple(shape) for shape in array.tolist()]


@torch.no_grad()
def check_decoder_layer(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, told = tensors(arrays), Expect(case, arrays), case["constructor"]
    sizes = [told[name] for name in ("d_model", "n_heads", "d_ffn")]
    layer = DeformableDecoderLayer(*sizes, 0.0, told["n_levels"], told["n_points"])
    fill_by_name(layer).eval()
    samples = []
    layer.cross_attn.register_forward_hook(lambda module, args, _: samples.append(module.samples(*args[:2], args[3])))
    tracking = Memory(given["pre_src"], shapes_of(given["pre_spatial_shapes"]), given["pre_padding_mask"])
    memory = (given["src"], shapes_of(given["spatial_shapes"]), given["padding_mask"])
    expect("output", layer(given["tgt"], given["query_pos"], given["reference_points"], *memory, tracking))
    locations, weights = samples[-1]
    expect("sampling_locations", locations)
    expect("attention_weights", weights)
    expect.finish()


@torch.no_grad()
def check_transformer(case: dict, arrays: Arrays, folder: Path) -> None:
    given, expect, told = tensors(arrays), Expect(case, arrays), case["constructor"]
    levels = told["num_feature_levels"]
    transformer = DeformableTransformer(
        channels=told["d_model"],
        heads=told["nhead"],
        encoder_layers=told["num_encoder_layers"],
        decoder_layers=told["num_decoder_layers"],
        ffn=told["dim_feedforward"],
        levels=levels,
        use_dab=False,
        refined=told["refine"],
    )
    fill_by_name(transformer).eval()
    current, earlier = (
        [[given[f"{prefix}{kind}{level}"] for level in range(levels)] for kind in ("src", "mask", "pos")]
        for prefix in ("", "pre_")
    )
    tracking, _ = transformer.encode(*earlier)
    decoded = transformer(*current, given["tgt"].flatten(0, 1), given["query_embed"], tracking)
    expect("hs", decoded.states)
    expect("init_reference", decoded.initial)
    expect("inter_references", decoded.boxes)
    for level in range(sum(name.startswith("memory") for name in arrays)):
        expect(f"memory{level}", decoded.memory[level])
    expect.finish()


def check_pairing(case: dict, arrays: Arrays, folder: Path) -> None:
    expect, count = Expect(case, arrays), case["constructor"]["num_frames"]
    rows = []
    for length, centre, seed in arrays["rows"][:, :3].tolist():
        indices = sample_clip(length, centre, count, random.Random(seed))
        rows.append([length, centre, seed, *indices, *neighbours(indices, length)])
    expect("rows", rows)
    told = int(re.search(r"referred object is (\d+)", case["arrays"]["example_masks"]["meaning"]).group(1))
    row = int(re.search(r"of row (\d+)", case["arrays"]["example_pre"]["meaning"]).group(1))
    before = rows[row][3 + count :]
    shown = keep_object(arrays["example_frames"].transpose(0, 3, 1, 2)[before], arrays["example_masks"][before] == told)
    expect("example_pre", shown.transpose(0, 2, 3, 1))
    expect.finish()


def stub(current: np.ndarray, tracking: np.ndarray) -> tuple[Tensor, Tensor]:
    """The closed-form network of the case: uint8 (3,H,W) each -> class logits (1,Q,1) and mask logits (Q,1,h,w)."""
    a, b = (
        F.avg_pool2d(normalise(torch.tensor(resize_short_side(image[None], SHORT_SIDE))).mean(1), 8)
        for image in (current, tracking)
    )
    masks = torch.stack((a - 0.2, b + 1.2, a + b + 0.9, b - a + 1.0, 1.1 - b))
    k = torch.arange(len(masks))
    return torch.cos(5 * (k + 1) * a.mean() + 7 * b.mean() + k)[None, :, None], masks


def compare_masks(expect: Expect, name: str, found: np.ndarray) -> None:
    """Masks bool against stored 0/255, in as many pixels as the case's notes ask for."""
    share = float(re.search(r"<= ([\d.]+) %", expect.case["notes"]).group(1)) / 100
    wanted = expect.arrays[name]
    assert found.shape == wanted.shape, name
    assert (wanted != ABSENT).all(), name
    differing = (found != (wanted == 255)).mean((1, 2)).max()
    assert differing <= share, f"{expect.case['file']}: {name}: {differing:.2%} of a frame's pixels differ"
    expect.left.discard(name)


def given_masks(initial: np.ndarray, key: int) -> np.ndarray:
    """Masks bool (T,H,W) that a case gives, which are those that the released schedule needs."""
    present = (initial != ABSENT).all((1, 2))
    assert np.flatnonzero(present).tolist() == given_frames(len(initial), key, "released")
    return initial == 255


def check_tracking_protocol(case: dict, arrays: Arrays, folder: Path) -> None:
    expect = Expect(case, arrays)
    for clip in range(sum(re.fullmatch(r"frames\d+", name) is not None for name in arrays)):
        frames, key = arrays[f"frames{clip}"].transpose(0, 3, 1, 2), int(arrays[f"key{clip}"])
        trace, queries = [], []

        def tracker(frame: int, last: int, image: np.ndarray, frames=frames, trace=trace, queries=queries):
            logits, masks = stub(frames[frame], image)
            query = select_queries(logits[None])[0].item()
            trace.append((frame, last))
            queries.append(query)
            return (probabilities(masks[query], frames.shape[-2:]) > 0.5)[0].numpy()

        found = track(frames, given_masks(arrays[f"init{clip}"], key), key, tracker, "released")
        assert trace == schedule(len(frames), key, "released")
        expect(f"trace{clip}", np.array(trace, int).reshape(-1, 2))
        expect(f"queries{clip}", np.array(queries, int))
        compare_masks(expect, f"final{clip}", found)
    expect.finish()


CHECKS: dict[str, Check] = {
    "decoder_layer": check_decoder_layer,
    "transformer": check_transformer,
    "pre_frame_pairing": check_pairing,
    "tracking_protocol": check_tracking_protocol,
}
