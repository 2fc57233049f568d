"""ReferFormer's own parts: clip sampling, answers for single frames, heads, classes in the matching."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.deformable_decoder import DeformableTransformer
from fewref.methods.layers.losses import criterion, stack_layers, stack_targets
from fewref.methods.layers.matcher import LossWeights, match, matching_cost
from fewref.methods.referformer.clip_sampling import sample_clip
from fewref.methods.referformer.net import ReferFormerNet, annotated_frames
from fewref.methods.referformer.postprocess import frame_answers, ranked_answers
from fewref.methods.text import TextFeatures


def small(**options: object) -> ReferFormerNet:
    """An untrained network of a few thousand weights, in eval mode."""
    torch.manual_seed(0)
    text = nn.Linear(4, 4)
    text.config = SimpleNamespace(hidden_size=4)
    sizes = {"hidden": 32, "heads": 4, "ffn": 8, "encoder_layers": 1, "decoder_layers": 2} | options
    return ReferFormerNet(
        backbone=build_backbone("tiny_resnet", channels=(8, 8, 8, 8)), text_encoder=text, **sizes
    ).eval()


def sentence(batch: int) -> TextFeatures:
    return TextFeatures(torch.randn(batch, 3, 32), torch.zeros(batch, 3, dtype=torch.bool), torch.randn(batch, 32))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("frames", [1, 3, 5, 9])
def test_a_clip_has_its_length_and_its_centre(length, frames):
    for centre in range(length):
        clip = sample_clip(length, centre, frames, random.Random(7))
        assert len(clip) == frames
        assert clip == sorted(clip)
        assert centre in clip
        assert 0 <= clip[0] <= clip[-1] < length
        assert clip == sample_clip(length, centre, frames, random.Random(7))
        if frames > 1:  # two of the frames lie at most three away, on either side
            assert min(abs(place - centre) for place in clip if place <= centre) == 0
            assert any(max(0, centre - 3) <= place < centre for place in clip) or centre == 0
            assert any(centre < place <= centre + 3 for place in clip) or centre == length - 1


def test_clips_that_cannot_be_are_refused():
    for length, centre, frames in ((5, 5, 3), (5, -1, 3), (0, 0, 1)):
        with pytest.raises(ValueError, match="no position"):
            sample_clip(length, centre, frames, random.Random(0))
    with pytest.raises(ValueError, match="1 frame or at least 3, not 2"):
        sample_clip(5, 0, 2, random.Random(0))


def one_frame(logits: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[0.5, 0.5, 0.5, 1.0], [0.25, 0.25, 0.5, 0.5]])
    return {"pred_logits": logits[None, None], "pred_masks": masks[None, None], "pred_boxes": boxes[None, None]}


def test_answers_for_a_frame_are_at_its_own_size():
    masks = torch.full((2, 2, 3), -5.0)
    masks[1] = 5.0
    outputs = one_frame(torch.tensor([[0.0], [2.0]]), masks)
    (answer,) = frame_answers(outputs, torch.tensor([[6, 10]]), [(12, 20)])
    assert answer.scores.tolist() == pytest.approx([0.5, 0.880797], abs=1e-6)
    assert answer.masks.shape == (2, 12, 20)
    assert not answer.masks[0].any()
    assert answer.masks[1].all()
    assert answer.boxes.tolist() == [[5.0, 0.0, 15.0, 12.0], [0.0, 0.0, 10.0, 6.0]]
    (ranked,) = ranked_answers(outputs, torch.tensor([[6, 10]]), [(12, 20)])
    for name in ("scores", "masks", "boxes"):
        assert torch.equal(getattr(ranked, name), getattr(answer, name).flip(0))


def test_a_query_with_two_good_classes_is_ranked_twice():
    masks = torch.stack((torch.full((1, 1), -5.0), torch.full((1, 1), 5.0)))
    outputs = one_frame(torch.tensor([[-9.0, -8.0], [1.0, 2.0]]), masks)
    (answer,) = ranked_answers(outputs, torch.tensor([[4, 4]]), [(4, 4)])
    assert answer.scores.tolist() == pytest.approx([0.880797, 0.731059], abs=1e-6)
    assert answer.masks.all()
    with pytest.raises(ValueError, match="expected one class, got 2"):
        frame_answers(outputs, torch.tensor([[4, 4]]), [(4, 4)])


def test_answers_of_whole_clips_are_refused():
    outputs = {name: torch.zeros(1, 2, 1, 1, 1) for name in ("pred_logits", "pred_masks", "pred_boxes")}
    with pytest.raises(ValueError, match="expected clips of one frame, got 2"):
        ranked_answers(outputs, torch.tensor([[4, 4]]), [(4, 4)])


@torch.no_grad()
def test_an_annotated_frame_is_answered_as_if_it_were_the_clip():
    net = small()
    frames, padding = torch.randn(2, 3, 3, 40, 48), torch.zeros(2, 3, 40, 48, dtype=torch.bool)
    padding[1, :, 32:] = True
    sizes, text, chosen = torch.tensor([[40, 48], [32, 48]]), sentence(2), torch.tensor([2, 0])
    found = net(annotated_frames(net.encode_query(frames, padding), chosen), None, sizes, text)
    alone = net(frames[[0, 1], chosen][:, None], padding[:, :1], sizes, text)
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        torch.testing.assert_close(found[name], alone[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_refinement_all_layers_start_from_the_same_points():
    net = small(refined=False, coordinates=False, classes=3)
    frames, padding = torch.randn(1, 2, 3, 40, 48), torch.zeros(1, 2, 40, 48, dtype=torch.bool)
    output = net(frames, padding, torch.tensor([[40, 48]]), sentence(1))
    assert output["pred_logits"].shape == (1, 2, 5, 3)
    # The last layer of the box head starts at zero, so that boxes are the points, with sizes of sigmoid(-2).
    points = net.transformer.reference_points(net.query_embed.weight).sigmoid()
    for layer in (output, *output["aux_outputs"]):
        torch.testing.assert_close(layer["pred_boxes"][0, 1, :, :2], points)
        torch.testing.assert_close(layer["pred_boxes"][..., 2:], torch.full((1, 2, 5, 2), 0.1192029))
    torch.testing.assert_close(output["reference_points"][0, 0], points)


def test_anchor_boxes_need_refinement():
    with pytest.raises(ValueError, match="refined=False does not go with them"):
        DeformableTransformer(channels=32, heads=4, use_dab=True, refined=False)


def predictions(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two frames whose queries differ in their logits (2,Q,K) alone."""
    q = logits.shape[1]
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 2, q, 4)
    return {"pred_logits": logits[None], "pred_boxes": boxes, "pred_masks": torch.zeros(1, 2, q, 2, 2)}


def target(valid: list[int], label: int) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 2),
        "masks": torch.zeros(2, 8, 8),
        "valid": torch.tensor(valid),
        "labels": torch.full((2,), label),
    }


def chosen(outputs: dict, aim: dict, **options: bool) -> int:
    tubes = stack_layers(outputs)
    return match(matching_cost(tubes, stack_targets([aim], tubes), LossWeights(), **options)).item()


def test_the_class_counts_where_it_is_told_to():
    """Query 0 is surer at the frame with the object, query 1 at the frame without it and on the whole."""
    outputs = predictions(torch.tensor([[[1.0], [0.0]], [[-5.0], [5.0]]]))
    assert chosen(outputs, target([1, 0], 0)) == 1
    assert chosen(outputs, target([1, 0], 0), classify_valid=True) == 0
    assert chosen(outputs, target([0, 0], 0), classify_valid=True) == 0  # all alike: the first
    total, terms = criterion(outputs, [target([1, 0], 0)], classify_valid=True)
    assert torch.isfinite(total)
    assert terms["loss_ce"] != criterion(outputs, [target([1, 0], 0)])[1]["loss_ce"]


def test_the_class_of_the_target_is_matched_and_trained():
    logits = torch.tensor([[3.0, -3.0], [-3.0, 3.0]]).expand(2, 2, 2).clone().requires_grad_()
    outputs = predictions(logits)
    assert [chosen(outputs, target([1, 1], label)) for label in (0, 1)] == [0, 1]
    total, terms = criterion(outputs, [target([1, 0], 1)])
    total.backward()
    # Down is where the logit grows: that of the matched query and the target's class, at the valid frame alone.
    assert (logits.grad < 0).nonzero().tolist() == [[0, 1, 1]]
    assert "cardinality_error" not in terms
