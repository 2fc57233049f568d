"""Nearest prototypes: the specification's figures, a slow reference, and what does not count."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from toy_trainable import Toy, query_of, support_of

from fewref.methods.adaptation.adapted import AdaptationError, wrap
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.adaptation.prototype import foreground_probability, pool, prototypes, soft_masks


def test_the_example_of_the_specification():
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])
    known = pool([(maps, torch.tensor([[[1.0, 0.5], [0.0, 0.0]]]))], epsilon=0)
    assert known.foreground.tolist() == pytest.approx([4 / 3, 1 / 3], abs=1e-12)
    assert known.background.tolist() == pytest.approx([3.2, 0.6], abs=1e-12)
    asked = torch.tensor([2.0, 1.0])[None, :, None, None]
    assert foreground_probability(asked, known, 20.0).item() == pytest.approx(0.572794, abs=1e-6)
    difference = 20 * (0.976187 - 0.961524)
    assert foreground_probability(asked, known, 20.0).item() == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-5)


def slow_reference(method, shots, query, temperature):
    """Pixel after pixel, in plain Python numbers; the soft mask is read where PIL-free bilinear weights say."""
    inside, outside, area, rest = np.zeros(8), np.zeros(8), 0.0, 0.0
    for shot in shots:
        maps = method.features(shot.frames).detach().double().numpy()
        for frame, mask in zip(maps, shot.masks, strict=True):
            soft = np.zeros(frame.shape[1:])
            for y, x in np.ndindex(soft.shape):  # stride 2: each cell is the mean of its four pixels
                soft[y, x] = mask[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()
            if soft.sum() < 1:
                continue
            for y, x in np.ndindex(soft.shape):
                inside += soft[y, x] * frame[:, y, x]
                outside += (1 - soft[y, x]) * frame[:, y, x]
                area, rest = area + soft[y, x], rest + 1 - soft[y, x]
    both = [inside / (area + 1e-6), outside / (rest + 1e-6)]
    maps = method.features(query.frames).detach().double().numpy()
    prob = np.zeros((len(maps), *maps.shape[2:]))
    for t, y, x in np.ndindex(prob.shape):
        one = maps[t, :, y, x]
        scores = [temperature * one @ c / np.linalg.norm(one) / np.linalg.norm(c) for c in both]
        prob[t, y, x] = math.exp(scores[0]) / (math.exp(scores[0]) + math.exp(scores[1]))
    height, width = query.frames.shape[2:]
    return np.stack(
        [np.asarray(Image.fromarray(p.astype(np.float32)).resize((width, height), Image.BILINEAR)) for p in prob]
    )


@pytest.mark.parametrize("numbers", [(0,), (1, 2, 3)])
def test_a_slow_reference(numbers):
    method, shots = Toy(window=3), support_of(*numbers).shots
    expected = slow_reference(method, shots, query_of(9), 20.0)
    adapted = wrap(method, AdaptOptions("prototype", temperature=20.0))
    adapted.adapt(support_of(*numbers))
    answer = adapted.predict(query_of(9))
    clear = abs(expected - 0.5) > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(answer.masks[clear], expected[clear] > 0.5)
    assert 0 < answer.masks.mean() < 1
    assert answer.confidence == pytest.approx(expected[answer.masks].mean(), abs=1e-5)
    assert answer.masks.shape == (6, 24, 32)


def test_chunks_do_not_matter():
    shots = support_of(0, 1).shots
    one, other = (prototypes(Toy(window=window), shots) for window in (1, 10))
    assert torch.allclose(one.foreground, other.foreground, rtol=0, atol=1e-7)
    maps, masks = torch.rand(4, 5, 6, 7), torch.rand(4, 6, 7)
    whole, cut = pool([(maps, masks)]), pool([(maps[:1], masks[:1]), (maps[1:], masks[1:])])
    assert torch.allclose(whole.background, cut.background, rtol=0, atol=1e-12)


def test_the_sentence_is_not_read():
    adapted = wrap(Toy(), AdaptOptions("prototype"))
    query = query_of(9)
    adapted.adapt(support_of(0))
    one, other = adapted.predict(query), adapted.predict(dataclasses.replace(query, text="the other one"))
    assert np.array_equal(one.masks, other.masks)
    assert adapted.names == ()
    assert (adapted.record.steps, adapted.record.trained) == (0, 0)


def test_frames_with_less_than_a_pixel_do_not_count():
    maps, masks = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4)
    masks[0, 0, 0], masks[1, 1] = 0.9, 1.0
    both, second = pool([(maps, masks)]), pool([(maps[1:], masks[1:])])
    assert torch.equal(both.foreground, second.foreground)
    assert torch.equal(both.background, second.background)
    with pytest.raises(AdaptationError, match="less than one pixel of the feature map in every frame"):
        pool([(maps[:1], masks[:1])])


def test_masks_stay_soft():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, :3] = True
    assert soft_masks(masks, torch.zeros(1, 1, 2, 2))[0].tolist() == [[0.5, 0.25], [0.0, 0.0]]


def test_a_query_without_foreground_has_no_confidence():
    method = Toy()
    adapted = wrap(method, AdaptOptions("prototype"))
    adapted.adapt(support_of(0))
    adapted._prototypes = dataclasses.replace(adapted._prototypes, foreground=-adapted._prototypes.background)
    answer = adapted.predict(query_of(9))
    assert (answer.masks.any(), answer.confidence) == (False, 0.0)
