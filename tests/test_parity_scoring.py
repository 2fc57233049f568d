"""The scorer against numbers made by running the upstream scorers; every case of cases.json runs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fewref.benchmark import metrics
from fewref.benchmark.a2d import COCO_NAMES, THRESHOLDS, a2d_metrics
from fewref.benchmark.davis import davis_evaluation, refdavis_merge
from fewref.benchmark.metrics import boundary_counts, contour_accuracy, frame_scores, radius, region_similarity
from fewref.benchmark.scoring import get_scoring, pool_frames, resize_masks, score_query, sequence_statistics
from fewref.kernels import mask_scores, packed_bits

GOLDEN = Path(os.environ.get("FEWREF_GOLDEN_DIR", Path(__file__).parent / "golden")) / "scoring"
REAL = Path(__file__).resolve().parents[2] / "shared/golden/scoring"  # holds real masks, which are not shipped
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK = 10


def read_cases(folder: Path, real: bool) -> list[tuple[Path, dict]]:
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return [(folder, case) for case in cases if not real or case["file"].startswith("real_")]


CASES = read_cases(GOLDEN, real=False)
if GOLDEN.resolve() != REAL and (REAL / "cases.json").exists():
    CASES += read_cases(REAL, real=True)


def unpack(packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    height, width = map(int, shape)
    return np.unpackbits(packed, axis=1)[:, : height * width].reshape(-1, height, width).astype(bool)


def check_frames(folder: Path, case: dict) -> None:
    data = np.load(folder / case["file"])
    shape = data["shape"]
    gt, pred = unpack(data["gt"], shape), unpack(data["pred"], shape)
    void = unpack(data["void"], shape) if "void" in data else None
    for column, (kind, tolerance, hidden) in enumerate((("davis", 0.008, void), ("official", 0.010, None))):
        j, f, counts = frame_scores(pred, gt, tolerance, hidden)
        assert radius(*gt.shape[1:], tolerance) == data["radius"][column]
        assert np.array_equal(counts[:, 2:], data[f"counts_{kind}"])
        assert np.array_equal(boundary_counts(pred, gt, tolerance, hidden), data[f"counts_{kind}"])
        assert np.array_equal(j, data[f"J_{kind}"])
        assert np.array_equal(f, data[f"F_{kind}"])
        assert np.array_equal(region_similarity(pred, gt, hidden), data[f"J_{kind}"])
        assert np.array_equal(contour_accuracy(pred, gt, tolerance, hidden), data[f"F_{kind}"])
        if kind == "davis":
            assert np.array_equal(counts[:, :2], data["inter_union"])
    if "gt_boundary" in data:
        visible = gt if void is None else gt & ~void
        edges = np.zeros(gt.shape, np.uint8)
        packed_bits.boundary(visible.view(np.uint8), edges)
        assert np.array_equal(edges.astype(bool), unpack(data["gt_boundary"], shape))


def check_frames_raw(folder: Path, case: dict) -> None:
    data = np.load(folder / case["file"])
    for kind, tolerance in (("davis", 0.008), ("official", 0.010)):
        assert np.array_equal(region_similarity(data["pred"], data["gt"]), data[f"J_{kind}"])
        assert np.array_equal(contour_accuracy(data["pred"], data["gt"], tolerance), data[f"F_{kind}"])


def check_statistics(folder: Path, case: dict) -> None:
    data = np.load(folder / case["file"])
    lengths = [name[1:] for name in data.files if name.startswith("v")]
    assert lengths
    for length in lengths:
        ours = sequence_statistics(data[f"v{length}"])
        np.testing.assert_allclose(ours, data[f"mrd_int64_{length}"], rtol=1e-12, atol=0)
        if int(length) < 256:  # from here on upstream's 8-bit edges wrap
            np.testing.assert_allclose(ours, data[f"mrd{length}"], rtol=1e-12, atol=0)


def check_sequences(folder: Path, case: dict) -> None:
    arrays, expected = (folder / name for name in case["file"].split(" + "))
    data, expected = np.load(arrays), json.loads(expected.read_text())
    names = [name[: -len("_gt")] for name in data.files if name.endswith("_gt")]
    gt = {name: data[f"{name}_gt"] for name in names}
    for task, suffix in (("semi-supervised", "_pred"), ("unsupervised", "_pred_unsup")):
        result, wanted = davis_evaluation(gt, {name: data[name + suffix] for name in names}, task), expected[task]
        assert list(result.objects) == wanted["objects"]
        for letter, values in (("J", result.j), ("F", result.f)):
            for column, statistic in enumerate("MRD"):
                ours = [value[column] for value in values]
                np.testing.assert_allclose(ours, wanted[f"{letter}_{statistic}"], rtol=1e-12, atol=1e-15)
        assert result.total == pytest.approx(wanted["global_row"], rel=1e-12)


def upstream_masks(logits: np.ndarray, masks: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """What the few-shot test loop hands to its scorer: per chunk the surest query, resized, then thresholded."""
    scored, chosen = [], []
    for start in range(0, len(masks), CHUNK):
        part = slice(start, start + CHUNK)
        sure = torch.from_numpy(logits[part]).sigmoid().mean(dim=0).max(dim=-1).values
        chosen.append(int(sure.argmax()))
        values = torch.from_numpy(masks[part][:, chosen[-1], None])
        values = torch.nn.functional.interpolate(values, tuple(map(int, size)), mode="bilinear", align_corners=False)
        scored.append((values[:, 0].sigmoid() > 0.5).numpy())
    return np.concatenate(scored), chosen


def check_official(folder: Path, case: dict) -> None:
    arrays, expected = (folder / name for name in case["file"].split(" + "))
    data, expected = np.load(arrays), json.loads(expected.read_text())
    names = sorted((name[:-3] for name in data.files if name.endswith("_gt")), key=lambda name: int(name[1:]))
    scores = []
    for name in names:
        size, gt = data[f"{name}_size"], data[f"{name}_gt"]
        pred, chosen = upstream_masks(data[f"{name}_logits"], data[f"{name}_masks"], size)
        assert chosen == data[f"{name}_query"].tolist()
        assert np.array_equal(pred, unpack(data[f"{name}_pred_rs"], size))
        assert np.array_equal(resize_masks(gt, *map(int, size)), unpack(data[f"{name}_gt_rs"], size))
        score = score_query(get_scoring("cma-paper"), np.zeros_like(gt, bool), gt.astype(bool), pred)
        assert (score.height, score.width, score.resized) == (*size, False)
        assert np.array_equal(score.j, data[f"{name}_J"])
        assert np.array_equal(score.f, data[f"{name}_F"])
        scores.append(score)
    for wanted in expected.values():
        pooled = pool_frames(scores, [str(slot) for slot in wanted["class_of_video"]])
        ours = {
            int(slot): row
            for slot, *row in zip(pooled.slots, pooled.j, pooled.f, pooled.iou, pooled.frames, strict=True)
        }
        theirs = zip(wanted["j_score"], wanted["f_score"], wanted["iou_list"], wanted["n"], strict=True)
        assert ours == {
            slot: pytest.approx(row, rel=1e-12) for slot, row in zip(wanted["classes"], theirs, strict=True)
        }
        assert (pooled.mean_j, pooled.mean_f) == pytest.approx((wanted["mean_J"], wanted["mean_F"]), rel=1e-12)


def check_refdavis_merge(folder: Path, case: dict) -> None:
    data = np.load(folder / case["file"])
    names = [name[: -len("_logits")] for name in data.files if name.endswith("_logits")]
    assert names
    for name in names:
        assert np.array_equal(refdavis_merge(data[f"{name}_logits"]), data[f"{name}_labels"])


def check_a2d(folder: Path, case: dict) -> None:
    data = np.load(folder / case["file"])
    gt, scores = unpack(data["gt"], data["shape"]), data["scores"]
    pred = unpack(data["pred"], data["shape"]).reshape(*scores.shape, *gt.shape[1:])
    ours = a2d_metrics(data["ids"].tolist(), gt, pred, scores)
    assert [ours[f"P@{x}"] for x in THRESHOLDS] == data["precision_at_k"].tolist()
    assert ours["overall_iou"] == pytest.approx(float(data["overall_iou"]), rel=1e-6)
    assert ours["mean_iou"] == pytest.approx(float(data["mean_iou"]), rel=1e-6)
    np.testing.assert_allclose([ours[name] for name in COCO_NAMES], data["coco_stats"], rtol=1e-12)


CHECKS = {
    "frames": check_frames,
    "frames_raw": check_frames_raw,
    "statistics": check_statistics,
    "sequences": check_sequences,
    "official": check_official,
    "refdavis_merge": check_refdavis_merge,
    "a2d": check_a2d,
}


def count_on_device(pred: np.ndarray, gt: np.ndarray, reach: int) -> np.ndarray:
    tensors = (torch.from_numpy(np.ascontiguousarray(item)).to(DEVICE) for item in (pred, gt))
    return mask_scores.frame_counts(*tensors, reach).cpu().numpy()


FORMS = {"packed": packed_bits.frame_counts, "device": count_on_device}
COUNTED = ("frames", "frames_raw", "sequences", "official")
RUNS = [
    pytest.param(folder, case, form, id=f"{case['file'].split('.')[0]}-{form}")
    for folder, case in CASES
    for form in (FORMS if case["kind"] in COUNTED else ["packed"])
]


@pytest.mark.parametrize(("folder", "case", "form"), RUNS)
def test_parity(folder: Path, case: dict, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "frame_counts", FORMS[form])
    CHECKS[case["kind"]](folder, case)
