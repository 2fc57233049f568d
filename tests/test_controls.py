"""The controls do what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from fewref.episodes.types import Clip, Expression, Query, Shot, SupportSet
from fewref.methods.controls import CopySupport, Empty, Oracle, Random

CLIP = Clip("test", "a", ("0", "1"))


def query(name: str = "a:0", size: tuple[int, int] = (20, 30), frames: int = 2) -> Query:
    return Query(name, CLIP, "dog", np.zeros((frames, 3, *size), dtype=np.uint8))


def support(*masks: np.ndarray) -> SupportSet:
    expression = Expression("0", "dog", ("1",), "dog")
    shots = (Shot(CLIP, expression, np.zeros((len(m), 3, *m.shape[1:]), np.uint8), m) for m in masks)
    return SupportSet("dog", tuple(shots))


def box(size: tuple[int, int], top: int, bottom: int, left: int, right: int, frames: int = 2) -> np.ndarray:
    masks = np.zeros((frames, *size), dtype=bool)
    masks[:, top:bottom, left:right] = True
    return masks


def test_empty():
    answer = Empty().predict(query())
    assert answer.masks.shape == (2, 20, 30)
    assert answer.masks.dtype == bool
    assert not answer.masks.any()


def test_random_depends_on_seed_and_query_alone():
    first = Random(seed=1)
    first.adapt(support(box((5, 5), 0, 2, 0, 2)))
    answer = first.predict(query())
    assert np.array_equal(answer.masks, Random(seed=1).predict(query()).masks)
    assert not np.array_equal(answer.masks, Random(seed=2).predict(query()).masks)
    assert not np.array_equal(answer.masks, Random(seed=1).predict(query("a:1")).masks)
    assert np.array_equal(answer.masks[0], answer.masks[1])


def test_random_ellipses_have_the_stated_sizes():
    areas = [Random().predict(query(f"a:{n}", (100, 200), 1)).masks.sum() for n in range(200)]
    assert max(areas) < np.pi * 40 * 40
    assert min(areas) < 400  # some are small or stick out of the frame
    assert 500 < np.mean(areas) < np.pi * 22.5**2  # the mean ellipse, less what sticks out


def test_copy_support_of_one_mask_is_that_mask():
    method, mask = CopySupport(), box((20, 30), 3, 9, 5, 20)
    method.adapt(support(mask))
    assert np.array_equal(method.predict(query()).masks, mask)


def test_copy_support_scales_with_the_query():
    method = CopySupport()
    method.adapt(support(box((20, 30), 4, 10, 5, 20)))
    masks = method.predict(query(size=(40, 60))).masks
    assert np.array_equal(masks, box((40, 60), 8, 20, 10, 40))


def test_copy_support_majority_over_shots():
    method = CopySupport()
    left, middle = box((20, 30), 0, 20, 0, 15), box((20, 30), 0, 20, 10, 20)
    method.adapt(support(left, middle, left))
    assert np.array_equal(method.predict(query()).masks, left)


def test_copy_support_without_majority_takes_the_mean_area():
    method = CopySupport()
    corners = [box((20, 30), 0, 4, 0, 5), box((20, 30), 10, 14, 10, 15), box((20, 30), 2, 6, 2, 7)]
    method.adapt(support(*corners))
    assert np.array_equal(method.predict(query()).masks, box((20, 30), 2, 4, 2, 5))  # where two of three overlap
    method.adapt(support(corners[0], corners[1]))
    masks = method.predict(query()).masks
    assert masks[0].sum() == 20
    assert masks[0][:4, :5].all()  # a tie, taken in reading order


def test_copy_support_forgets_and_takes_empty_masks():
    method = CopySupport()
    method.adapt(support(box((20, 30), 3, 9, 5, 20)))
    method.adapt(support(np.zeros((2, 20, 30), dtype=bool)))
    answer = method.predict(query())
    assert not answer.masks.any()
    assert answer.confidence == 0


def test_oracle_repeats_what_it_was_shown_and_nobody_else_may_look():
    method, truth = Oracle(), box((20, 30), 1, 2, 3, 9)
    method.reveal(truth)
    assert np.array_equal(method.predict(query()).masks, truth)
    assert Oracle.info.sees_truth
    with pytest.raises(TypeError, match="sees_truth"):
        Empty().reveal(truth)
