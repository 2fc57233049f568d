"""Pseudo-labels: uncertainty, choice of frames, thresholds, the teacher, rounds and collapse."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from toy_trainable import Toy, query_of, state, support_of

from fewref.episodes.types import Query
from fewref.methods.adaptation import self_train as module
from fewref.methods.adaptation.adapted import wrap
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.adaptation.self_train import (
    Label,
    Teacher,
    band,
    collapsed,
    frame_uncertainty,
    mean_iou,
    pick_frames,
    pixel_uncertainty,
    pixel_weights,
    pseudo_clips,
)


def options(**changes) -> AdaptOptions:
    return AdaptOptions("self-train", **{"steps": 6, "lr": 0.01, **changes})


def blob(*levels: float, size=(20, 30)) -> torch.Tensor:
    """A frame per level: a square of that probability on a background as sure."""
    prob = torch.stack([torch.full(size, 1 - level) for level in levels])
    for frame, level in zip(prob, levels, strict=True):
        frame[5:12, 8:15] = level
    return prob


def test_the_check_values_of_the_specification():
    got = pixel_uncertainty(torch.tensor([0.02, 0.3, 0.5, 0.8, 0.97], dtype=torch.float64)).tolist()
    assert got == pytest.approx([0.1414, 0.8813, 1, 0.7219, 0.1944], abs=5e-5)
    ends = pixel_uncertainty(torch.tensor([0.0, 1.0]))
    assert ends.isfinite().all()
    assert (ends < 1e-4).all()


def test_the_band_is_two_percent_of_the_diagonal():
    masks = torch.zeros(1, 300, 400, dtype=torch.bool)
    masks[0, 100, 200] = True
    rows, columns = torch.nonzero(band(masks)[0], as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (90, 110, 190, 210)


def test_frame_uncertainty_is_normalised_by_area():
    small, large = torch.full((1, 40, 40), 0.01), torch.full((1, 40, 40), 0.01)
    small[0, 10:12, 10:12], large[0, 5:25, 5:25] = 0.9, 0.9
    near = band(small > 0.5)[0]
    expected = pixel_uncertainty(small.double())[0][near].mean()
    assert frame_uncertainty(small).item() == pytest.approx(expected.item(), abs=1e-12)
    assert frame_uncertainty(large).item() < 3 * frame_uncertainty(small).item()  # of a hundred times the area
    assert frame_uncertainty(torch.zeros(1, 4, 4)).isnan().all()


@pytest.mark.parametrize(
    ("levels", "share", "expected"),
    [
        ((0.9, 0.6, 0.95, 0.7), 0.5, [0, 2]),
        ((0.9, 0.9, 0.9, 0.9), 0.5, [0, 1]),
        ((0.6, 0.9, 0.7), 0.1, [1]),
        ((0.6, 0.9, 0.7), 0.34, [1, 2]),
        ((0.2, 0.9, 0.7), 1.0, [1, 2]),
    ],
)
def test_the_surest_frames_are_chosen(levels, share, expected):
    prob = blob(*levels)
    if levels[0] == 0.2:
        prob[0] = 0.1  # shows nothing
    assert pick_frames(Label(prob, 0.9), share) == expected


def test_what_abstains():
    assert pick_frames(Label(blob(0.9, 0.9), 0.29), 1.0) == []
    assert pick_frames(Label(torch.zeros(3, 20, 30), 0.9), 1.0) == []
    prob = torch.zeros(2, 100, 100)
    prob[0, 0, 0], prob[1, 0, :2] = 0.9, 0.9  # 0.01 % and 0.02 %
    assert pick_frames(Label(prob, 0.9), 1.0) == [1]


def test_pixel_weights_of_each_class_and_frame():
    prob = torch.tensor([[[0.99, 0.95, 0.9, 0.8, 0.6, 0.1, 0.2, 0.01, 0.02, 0.03]]])
    weights = pixel_weights(prob)[0, 0]
    sure = 1 - pixel_uncertainty(prob)[0, 0]
    # foreground: 20 % quantile of (.6 .8 .9 .95 .99) is .76; background: of (.8 .9 .97 .98 .99) it is .88
    kept = torch.tensor([1, 1, 1, 1, 0, 1, 0, 1, 1, 1]).bool()
    assert torch.equal(weights > 0, kept)
    assert torch.allclose(weights[kept], sure[kept])
    assert not pixel_weights(torch.full((1, 3, 3), 0.65)).any()


def test_the_teacher_follows_slowly():
    start, goal = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    teacher = Teacher(start)
    for _ in range(5):
        teacher.follow(goal)
    assert teacher.weights["a"].tolist() == pytest.approx([1 - 0.99**5] * 3)
    assert start["a"].tolist() == [0, 0, 0]


def test_agreement_and_collapse():
    one = torch.zeros(2, 4, 4, dtype=torch.bool)
    other = one.clone()
    one[0, :2], other[0, 1:3] = True, True
    assert mean_iou(one, other) == pytest.approx((1 / 3 + 1) / 2)
    assert not collapsed(one, other)
    small = torch.zeros_like(one)
    small[0, 0, :2] = True
    assert collapsed(one, small)
    assert collapsed(small, one)
    assert not collapsed(small, small)


def test_pseudo_clips_hold_the_chosen_frames_only():
    method = Toy(window=3)
    prob = blob(0.9, 0.6, 0.95, 0.9, 0.9, 0.55, size=(24, 32))
    clips = pseudo_clips(method, query_of(5), Label(prob, 0.9), support_of(0, 1, frames=2), 0.6)
    assert [clip.shot.clip.frames for clip in clips] == [("00000", "00002"), ("00003", "00004")]
    for clip in clips:
        places = [int(name) for name in clip.shot.clip.frames]
        assert np.array_equal(clip.shot.frames, query_of(5).frames[places])
        assert np.array_equal(clip.shot.masks, (prob > 0.5).numpy()[places])
        near = band(prob > 0.5)[places]
        assert clip.weight == pytest.approx(float(pixel_weights(prob)[places][near].mean()), abs=1e-6)
        assert clip.shot.expression.text == query_of(5).text
    method.info = dataclasses.replace(Toy.info, uses_support=False)
    clips = pseudo_clips(method, query_of(5), Label(prob, 0.9), support_of(0, frames=2), 0.6)
    assert [len(clip.shot.frames) for clip in clips] == [3, 1]


def spy(monkeypatch, **replaced):
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value)


def test_without_a_sure_frame_it_is_fine_tuning_by_the_teacher():
    class Unsure(Toy):
        def probabilities(self, query):
            return super().probabilities(query)[0], 0.1

    unsure, plain = Unsure(), Toy()
    adapted = wrap(unsure, options())
    adapted.adapt(support_of(0))
    adapted.predict(query_of(5))
    wrap(plain, AdaptOptions("finetune", steps=6, lr=0.01)).adapt(support_of(0))
    assert [shot.frames.tobytes() for shot in unsure.seen] == [shot.frames.tobytes() for shot in plain.seen]
    assert adapted.record.steps == 6


def test_the_query_is_learned_from_after_the_start(monkeypatch):
    spy(monkeypatch, mean_iou=lambda *_: 0.5, collapsed=lambda *_: False)
    method = Toy()
    adapted = wrap(method, options(rounds=3, steps=7))
    adapted.adapt(support_of(0))
    assert method.seen == []
    adapted.predict(query_of(5))
    kinds = [shot.expression.id for shot in method.seen]
    assert kinds.count("pseudo") == 6  # all steps but the first, whose share is 0
    assert kinds.count("0") == adapted.record.steps == 7
    assert adapted.record.stop == ""
    assert adapted.record.trained == sum(
        weight.numel() for name, weight in method.network.named_parameters() if name.startswith(("trunk.0", "contr"))
    )


def test_labels_that_agree_end_it(monkeypatch):
    spy(monkeypatch, mean_iou=lambda *_: 0.99)
    adapted = wrap(Toy(), options(rounds=3))
    adapted.adapt(support_of(0))
    adapted.predict(query_of(5))
    assert (adapted.record.steps, adapted.record.stop) == (2, "round 1: the labels agree")


def test_a_single_step_is_taken():
    adapted = wrap(Toy(), options(rounds=3, steps=1))
    adapted.adapt(support_of(0))
    adapted.predict(query_of(5))
    assert adapted.record.steps == 1


def test_a_collapse_undoes_its_round(monkeypatch):
    spy(monkeypatch, collapsed=lambda *_: True)
    method, plain = Toy(), Toy()
    answers = []
    monkeypatch.setattr(method, "predict", lambda query: answers.append(method.probabilities(query)[0]))
    adapted = wrap(method, options(rounds=3, lr=0.1))
    adapted.adapt(support_of(0))
    adapted.predict(query_of(5))
    assert adapted.record.stop.startswith("round 1: the labelled area changed threefold")
    plain.adapt(support_of(0))
    assert torch.equal(answers[0], plain.probabilities(query_of(5))[0])


def test_the_answer_is_the_teachers(monkeypatch):
    class Watching(Toy):
        def predict(self, query):
            taken.update({name: weight.clone() for name, weight in self.network.named_parameters()})
            modes.append(any(part.training for part in self.network.modules()))
            return super().predict(query)

    spy(monkeypatch, collapsed=lambda *_: False)
    taken, modes, method = {}, [], Watching()
    before = {name: weight.detach().clone() for name, weight in method.network.named_parameters()}
    adapted = wrap(method, options(lr=0.1, steps=4, rounds=1))
    adapted.adapt(support_of(0))
    adapted.predict(query_of(5))
    moved = max(float((taken[name] - before[name]).detach().abs().max()) for name in before)
    assert 0 < moved < 0.1 * 4 * (1 - 0.99**4)  # Adam's steps of 0.1 at most, averaged
    assert modes == [False]
    after = dict(method.network.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_only_the_frames_of_the_one_query_are_seen():
    """A query has no masks by type; another query in between leaves no trace."""
    assert not {field.name for field in dataclasses.fields(Query)} & {"masks", "target", "truth"}
    adapted = wrap(Toy(), options(lr=0.1))
    before = state(adapted.method)
    adapted.adapt(support_of(0))
    first, losses = adapted.predict(query_of(5)), adapted.record.losses
    adapted.predict(query_of(6))
    assert adapted.record.losses != losses
    again = adapted.predict(query_of(5))
    assert np.array_equal(first.masks, again.masks)
    assert adapted.record.losses == losses
    assert all(math.isfinite(loss) for loss in losses)
    assert state(adapted.method) == before
