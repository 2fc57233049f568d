"""The support as training tasks: turns, memory, and variants of a clip."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from toy_trainable import blind, support_of

from fewref.episodes.types import Shot
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.adaptation.record import AdaptationError
from fewref.methods.adaptation.support import part, tasks, vary
from fewref.methods.check import make_case

PLAIN = AdaptOptions("finetune", augment=False)


def shown_in(shot: Shot, *places: int) -> Shot:
    masks = shot.masks.copy()
    masks[[place for place in range(len(masks)) if place not in places]] = False
    return dataclasses.replace(shot, masks=masks)


def named(task, steps: int) -> list:
    return [(target.clip.video, [shot.clip.video for shot in memory]) for target, memory in map(task, range(steps))]


def test_shots_take_turns_and_are_never_their_own_memory():
    a, b, c = support_of(0, 1, 2).shots
    names = [shot.clip.video for shot in (a, b, c)]
    expected = [(names[place], [name for name in names if name != names[place]]) for place in (0, 1, 2, 0)]
    assert named(tasks((a, b, c), PLAIN, 0), 4) == expected


def test_a_shot_without_its_object_is_memory_alone():
    a, b = support_of(0, 1).shots
    hidden = shown_in(b)
    assert named(tasks((a, hidden), PLAIN, 0), 2) == [(a.clip.video, [b.clip.video])] * 2
    with pytest.raises(AdaptationError, match="never shows its object"):
        tasks(blind(support_of(0, 1)).shots, PLAIN, 0)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [(2, [((0,), (1,)), ((1,), (0,))]), (5, [((0, 1), (2, 3, 4)), ((3, 4), (0, 1, 2))]), (1, [((0,), (0,))])],
)
def test_one_shot_is_split_in_time(frames, expected):
    (shot,) = support_of(0, frames=frames).shots
    task = tasks([shot], PLAIN, 0)
    for step in range(4):
        target, (memory,) = task(step)
        wanted = [tuple(f"{place:05d}" for place in places) for places in expected[step % len(expected)]]
        assert [target.clip.frames, memory.clip.frames] == wanted
        for piece in (target, memory):
            places = [int(name) for name in piece.clip.frames]
            assert np.array_equal(piece.frames, shot.frames[places])
            assert np.array_equal(piece.masks, shot.masks[places])


def test_an_object_in_one_half_leaves_the_whole_clip():
    (shot,) = support_of(0).shots
    target, (memory,) = tasks([shown_in(shot, 0, 1)], PLAIN, 0)(0)
    assert len(target.frames) == len(memory.frames) == 4


def test_a_target_is_no_longer_than_the_memory():
    long, short = shown_in(support_of(0, frames=6).shots[0], 5), support_of(1, frames=2).shots[0]
    target, _ = tasks([long, short], PLAIN, 0)(0)
    assert target.clip.frames == ("00004", "00005")
    assert len(tasks([long, short], PLAIN, 0)(1)[0].frames) == 2


def test_without_memory_targets_are_whole():
    (shot,) = support_of(0).shots
    assert tasks([shot], PLAIN, 0, memory=False)(1) == (shot, [shot])


def test_variants_depend_on_seed_step_and_clip_alone():
    def pixels(seed, step, strategy="finetune", numbers=(0, 1)):
        return tasks(support_of(*numbers).shots, AdaptOptions(strategy), seed)(step)[0].frames.tobytes()

    assert pixels(0, 4) == pixels(0, 4) == pixels(0, 4, "head")
    assert pixels(0, 4) == pixels(0, 4, numbers=(0, 3))
    assert len({pixels(0, 4), pixels(1, 4), pixels(0, 6), pixels(0, 4, numbers=(3, 1))}) == 4


@pytest.mark.parametrize("seed", range(12))
def test_a_variant_keeps_the_object_and_its_pixels_together(seed):
    """Frames that show nothing but the mask: what becomes of one must become of the other."""
    (shot,) = make_case(seed, "dog", (96, 128), 2).support.shots
    painted = np.repeat(np.where(shot.masks, 230, 30).astype(np.uint8)[:, None], 3, axis=1)
    shot = dataclasses.replace(shot, frames=painted)
    shot = dataclasses.replace(shot, expression=dataclasses.replace(shot.expression, text="Left of the bright dog"))
    varied = vary(shot, np.random.default_rng(seed))
    assert (varied.frames.dtype, varied.masks.dtype) == (np.uint8, bool)
    assert (varied.frames.shape, varied.masks.shape) == (shot.frames.shape, shot.masks.shape)
    bright = varied.frames.mean(1) > 130
    assert (bright & varied.masks).sum() / (bright | varied.masks).sum() > 0.8
    assert 0.6 * shot.masks.sum() < varied.masks.sum() < 1.4 * shot.masks.sum()
    mirrored = np.random.default_rng(seed).random() < 0.5
    assert varied.expression.text == ("right of the bright dog" if mirrored else "Left of the bright dog")
    centre = [np.nonzero(masks.any((0, 1)))[0].mean() - masks.shape[2] / 2 for masks in (shot.masks, varied.masks)]
    if abs(centre[0]) > 20:
        assert (centre[0] * centre[1] < 0) == mirrored


def test_one_draw_serves_all_frames():
    (shot,) = support_of(0).shots
    still = part(shot, [0, 0, 0])
    varied = vary(still, np.random.default_rng(3))
    assert all(np.array_equal(frame, varied.frames[0]) for frame in varied.frames)
    assert all(np.array_equal(mask, varied.masks[0]) for mask in varied.masks)
    assert not np.array_equal(varied.frames[0], still.frames[0])


def test_an_object_at_the_border_stays():
    (shot,) = support_of(0).shots
    masks = np.zeros_like(shot.masks)
    masks[:, :2, :2] = True
    for seed in range(30):
        varied = vary(dataclasses.replace(shot, masks=masks), np.random.default_rng(seed))
        assert varied.masks.any((1, 2)).all()
