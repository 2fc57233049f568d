"""Scoring protocols, statistics, pooling and the DAVIS evaluation, on inputs small enough to reason about."""

import pickle

import numpy as np
import pytest

from fewref.benchmark.a2d import a2d_metrics
from fewref.benchmark.davis import davis_evaluation, refdavis_merge
from fewref.benchmark.metrics import contour_accuracy, radius, region_similarity
from fewref.benchmark.scoring import (
    SCORING,
    QueryScore,
    get_scoring,
    input_size,
    letterbox_masks,
    pool_frames,
    resize_masks,
    score_query,
    sequence_statistics,
)
from fewref.benchmark.speed_scoring import imperfect, moving_masks
from fewref.episodes.errors import InputError


def blob_pair(frames: int = 5, height: int = 90, width: int = 160) -> tuple[np.ndarray, np.ndarray]:
    truth = moving_masks(frames, height, width, seed=3)
    return imperfect(truth, seed=4), truth


def slow_bilinear(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel-centred bilinear interpolation of one 0/1 mask, pixel by pixel, cut above 0.5."""
    out = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * mask.shape[0] / height - 0.5, 0)
            u = max((x + 0.5) * mask.shape[1] / width - 0.5, 0)
            top, left = int(v), int(u)
            low, right = min(top + 1, mask.shape[0] - 1), min(left + 1, mask.shape[1] - 1)
            upper = mask[top, left] * (1 - u + left) + mask[top, right] * (u - left)
            lower = mask[low, left] * (1 - u + left) + mask[low, right] * (u - left)
            out[y, x] = upper * (1 - v + top) + lower * (v - top) > 0.5 + 1e-9
    return out


@pytest.mark.parametrize("name", ["davis", "mevis"])
def test_original_size_protocols(name: str) -> None:
    pred, truth = blob_pair()
    score = score_query(get_scoring(name), pred, truth, np.ones((5, 8, 8), bool))
    assert score.j == tuple(region_similarity(pred, truth))
    assert score.f == tuple(contour_accuracy(pred, truth, 0.008))
    assert (score.height, score.width, score.radius, score.resized) == (90, 160, radius(90, 160, 0.008), False)
    assert (score.intersection, score.union) == ((pred & truth).sum(), (pred | truth).sum())


def test_cma_paper_judges_the_masks_of_the_network() -> None:
    pred, truth = blob_pair()
    inputs = resize_masks(pred, 45, 81)
    score = score_query(get_scoring("cma-paper"), np.zeros_like(pred), truth, inputs)
    small = np.stack([slow_bilinear(mask, 45, 81) for mask in truth])
    assert score.j == tuple(region_similarity(inputs, small))
    assert score.f == tuple(contour_accuracy(inputs, small, 0.010))
    assert (score.height, score.width, score.resized) == (45, 81, False)


def test_cma_paper_resizes_where_it_has_to_and_says_so() -> None:
    pred, truth = blob_pair(2)
    score = score_query(get_scoring("cma-paper"), pred, truth)
    assert (score.height, score.width, score.radius, score.resized) == (360, 640, 8, True)
    again = score_query(get_scoring("cma-paper"), pred, truth, resize_masks(pred, 360, 640))
    assert (score.j, score.f) == (again.j, again.f)
    assert score_query(get_scoring("cma-paper"), truth, truth).j == (1.0, 1.0)


def test_ties_of_the_resize_become_background() -> None:
    mask = np.zeros((1, 2, 4), bool)
    mask[0, :, 0] = True
    mask[0, :, 2] = True
    assert not resize_masks(mask, 1, 2).any()
    mask[0, 0, 1] = True
    assert resize_masks(mask, 1, 2).tolist() == [[[True, False]]]


@pytest.mark.parametrize(
    ("size", "scored"),
    [
        ((480, 854), (360, 640)),
        ((720, 1280), (360, 640)),
        ((854, 480), (640, 360)),
        ((480, 910), (360, 682)),
        ((9, 9), (360, 360)),
    ],
)
def test_input_size(size: tuple[int, int], scored: tuple[int, int]) -> None:
    assert input_size(*size) == scored


def test_danet_paper_pads_to_its_box() -> None:
    wide = letterbox_masks(np.ones((1, 480, 854), bool), 241, 425)[0]
    assert wide.any(axis=1).nonzero()[0].tolist() == list(range(1, 239))  # 480 * 425 / 854 = 238.9 rows
    assert wide[1:239].all()
    tall = letterbox_masks(np.ones((2, 400, 100), bool), 241, 425)
    assert tall.shape == (2, 241, 425)
    assert tall[1].any(axis=0).nonzero()[0].tolist() == list(range((425 - 60) // 2, (425 - 60) // 2 + 60))
    pred, truth = blob_pair(3, 241, 425)
    score = score_query(get_scoring("danet-paper"), pred, truth)
    assert score.f == tuple(contour_accuracy(pred, truth, 0.008))
    assert (score.height, score.width) == (241, 425)


def test_protocols_are_told_apart() -> None:
    assert {name: (p.resolution, p.tolerance, p.average) for name, p in SCORING.items()} == {
        "davis": ("original", 0.008, "query"),
        "cma-paper": ("input", 0.010, "frame"),
        "danet-paper": ("letterbox", 0.008, "danet"),
        "mevis": ("original", 0.008, "query"),
    }
    with pytest.raises(InputError, match="did you mean 'cma-paper'"):
        get_scoring("cma-papr")


def test_scoring_travels_to_a_process_pool() -> None:
    function, protocol = pickle.loads(pickle.dumps((score_query, get_scoring("davis"))))
    pred, truth = blob_pair(1)
    assert pickle.loads(pickle.dumps(function(protocol, pred, truth))) == score_query(protocol, pred, truth)


def test_shapes_that_do_not_fit() -> None:
    pred, truth = blob_pair(2)
    with pytest.raises(InputError, match="must have the shape"):
        score_query(get_scoring("davis"), pred[:1], truth)
    with pytest.raises(InputError, match="one mask for each of 2 frames"):
        score_query(get_scoring("cma-paper"), pred, truth, pred[:1])


def test_sequence_statistics() -> None:
    assert sequence_statistics([0.7]) == (0.7, 1.0, 0.0)
    assert sequence_statistics([0.5, 0.5]) == (0.5, 0.0, 0.0)
    # Nine frames: edges 0, 2, 4, 6, 8, so the first bin is frames 0-2 and the last one 6-8.
    mean, recall, decay = sequence_statistics([1, 1, 1, 0, 0, 0, 0.25, 0.25, 0.25])
    assert (mean, recall, decay) == pytest.approx((3.75 / 9, 3 / 9, 0.75))
    mean, recall, _ = sequence_statistics([1.0, np.nan, 0.0, 1.0])
    assert (mean, recall) == (pytest.approx(2 / 3), 0.5)
    # From 256 frames on an 8-bit edge would wrap.
    assert sequence_statistics(np.linspace(1, 0, 1001))[2] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="at least one frame"):
        sequence_statistics([])


def test_pooling_weighs_frames_not_queries() -> None:
    long = QueryScore((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), 4, 4, 1, 30, 30)
    short = QueryScore((0.0,), (0.0,), 4, 4, 1, 0, 10)
    micro = pool_frames([long, short], ["all", "all"])
    assert (micro.j, micro.f, micro.iou, micro.frames) == ((0.75,), (0.375,), (0.75,), (4,))
    macro = pool_frames([long, short], ["dog", "cat"])
    assert (macro.slots, macro.mean_j, macro.mean_f, macro.iou) == (("dog", "cat"), 0.5, 0.25, (1.0, 0.0))


def two_objects() -> np.ndarray:
    labels = np.zeros((4, 40, 60), np.uint8)
    for t in range(4):
        labels[t, 5:15, 5 + t : 20 + t] = 1
        labels[t, 22:35, 30 - t : 50 - t] = 2
    return labels


def test_unsupervised_forgives_a_swap_that_identity_does_not() -> None:
    gt = two_objects()
    swapped = np.array([0, 2, 1], np.uint8)[gt]
    assert davis_evaluation({"a": gt}, {"a": swapped}, "unsupervised").total["J&F-Mean"] == 1
    assert davis_evaluation({"a": gt}, {"a": swapped}, "identity").total["J-Mean"] == 0
    right = davis_evaluation({"a": gt}, {"a": gt}, "identity")
    assert (right.objects, right.total["J&F-Mean"]) == (("a_1", "a_2"), 1)


def test_matching_finds_the_best_of_all_assignments() -> None:
    gt = two_objects()
    pred = np.where(gt == 1, 4, 0).astype(np.uint8)
    pred[gt == 2] = 1
    pred[:, 36:, :] = 3  # a spare proposal costs nothing
    total = davis_evaluation({"a": gt}, {"a": pred}, "unsupervised").total
    assert (total["J-Mean"], total["F-Mean"]) == (1, 1)


def test_void_and_the_dropped_frames() -> None:
    gt, pred = two_objects(), two_objects()
    pred[0] = pred[3] = 0
    assert davis_evaluation({"a": gt}, {"a": pred}, "semi-supervised").total["J&F-Mean"] == 1
    assert davis_evaluation({"a": gt}, {"a": pred}, "identity").total["J-Mean"] == 0.5
    gt[1:, 5:15] = 255
    pred = np.where(gt == 255, 1, gt)
    assert davis_evaluation({"a": gt}, {"a": pred}, "identity").total["J-Mean"] == 1
    assert davis_evaluation({"a": gt}, {"a": pred}, "semi-supervised").total["J-Mean"] == 0.5


def test_davis_evaluation_refuses() -> None:
    gt = {"a": two_objects()}
    with pytest.raises(InputError, match="did you mean"):
        davis_evaluation(gt, gt, "unsupervized")
    with pytest.raises(InputError, match="sequence b has no ground truth"):
        davis_evaluation(gt, {**gt, "b": gt["a"]}, "identity")
    with pytest.raises(InputError, match="sequence a has no result"):
        davis_evaluation(gt, {}, "identity")
    with pytest.raises(InputError, match="label 3"):
        davis_evaluation(gt, {"a": gt["a"] + (gt["a"] == 2)}, "identity")
    with pytest.raises(InputError, match="label 21"):
        davis_evaluation(gt, {"a": gt["a"] + 19 * (gt["a"] == 2).astype(np.uint8)}, "unsupervised")
    with pytest.raises(InputError, match="differ in shape"):
        davis_evaluation(gt, {"a": gt["a"][1:]}, "identity")
    with pytest.raises(InputError, match="none is left"):
        davis_evaluation({"a": gt["a"][:2]}, {"a": gt["a"][:2]}, "semi-supervised")


def test_merge_keeps_a_half_and_prefers_the_first() -> None:
    logits = np.array([[-9, 0, 3, 40, 1], [-9, -1, 3, 50, 2]], np.float32).reshape(2, 1, 1, 5)
    assert refdavis_merge(logits).tolist() == [[[0, 1, 1, 1, 2]]]


def test_a2d_thresholds_are_strict_and_the_last_of_equals_counts() -> None:
    gt = np.zeros((40, 40), bool)
    gt[:20, :20] = True
    half = gt.copy()
    half[:20, 10:] = False
    pred = np.stack([gt, half])
    tied = a2d_metrics(["v_a_f_1_i_0"], [gt], [pred], np.array([[0.5, 0.5]]))
    assert (tied["P@0.5"], tied["overall_iou"]) == (0.0, 0.5)
    first = a2d_metrics(["v_a_f_1_i_0"], [gt], [pred], np.array([[0.6, 0.5]]))
    assert (first["P@0.9"], first["mean_iou"], first["mAP"]) == (1.0, 1.0, pytest.approx(1.0))
    with pytest.raises(ValueError, match="one entry per sample"):
        a2d_metrics(["x", "x"], [gt, gt], [pred, pred], np.zeros((2, 2)))
