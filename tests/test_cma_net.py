"""CMANet beyond the golden numbers: batches, shots, what has no influence, variants, small sizes, half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fill import fill_by_name
from PIL import Image
from torch import Tensor

from fewref.episodes.errors import InputError
from fewref.methods import query_inference
from fewref.methods.cma import inference
from fewref.methods.cma.affinity import SupportFeatures, merge_shots
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.text import TextFeatures, build_text_encoder, load_tokenizer

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
H, W = 64, 96
NAMES = ("pred_logits", "pred_boxes", "pred_masks")


def small_net(variant: str = "cma", **options: object) -> CMANet:
    sizes = {"hidden": 64, "ffn": 64, "encoder_layers": 2, "decoder_layers": 2, **options}
    net = CMANet(
        backbone=build_backbone("tiny_resnet"),
        text_encoder=build_text_encoder(TEXT),
        variant=variant,
        freeze_backbone=False,
        **sizes,
    )
    return fill_by_name(net).eval()


@pytest.fixture(scope="module")
def net() -> CMANet:
    return small_net()


def clip(seed: int, b: int = 1, t: int = 3) -> tuple[Tensor, Tensor]:
    """Frames (B,T,3,H,W) and no padding."""
    frames = torch.randn(b, t, 3, H, W, generator=torch.Generator().manual_seed(seed))
    return frames, torch.zeros(b, t, H, W, dtype=torch.bool)


def masks(seed: int, b: int = 1, s: int = 3) -> Tensor:
    return (torch.rand(b, s, 50, 70, generator=torch.Generator().manual_seed(seed)) > 0.5).float()


def sentence(net: CMANet, seed: int, b: int = 1, length: int = 5) -> TextFeatures:
    ids = torch.randint(4, 40, (b, length), generator=torch.Generator().manual_seed(seed))
    return net.encode_text(ids, torch.ones_like(ids))


def support(net: CMANet, seed: int, s: int = 3) -> SupportFeatures:
    return net.encode_support(*clip(seed, t=s), masks(seed, s=s), sentence(net, seed))


SIZES = torch.tensor([[H, W]])


def assert_same(one: dict, other: dict, tolerance: float = 1e-4) -> None:
    for name in NAMES:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["cma", "self", "base"])
def test_a_batch_equals_its_clips_one_by_one(variant: str) -> None:
    net = small_net(variant, use_dab=variant == "cma")
    frames, padding = clip(0, b=2)
    padding[1, :, :, 80:] = True
    padding[1, :, 40:] = True
    sizes = torch.tensor([[H, W], [40, 80]])
    shots, shown = clip(1, b=2), masks(1, b=2)
    ids, attention = torch.randint(4, 40, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    ids[0, 5:], attention[0, 5:] = 1, 0
    text = net.encode_text(ids, attention)
    together = net(frames, padding, sizes, text, net.encode_support(*shots, shown, text))
    for item in range(2):
        part = slice(item, item + 1)
        length = int(attention[item].sum())
        text = net.encode_text(ids[part, :length], attention[part, :length])
        encoded = net.encode_support(*(tensor[part] for tensor in (*shots, shown)), text)
        alone = net(frames[part], padding[part], sizes[part], text, encoded)
        assert_same(alone, {name: together[name][part] for name in NAMES}, 1e-3)


@torch.no_grad()
def test_only_the_middle_support_frame_counts(net: CMANet) -> None:
    (frames, padding), shown, text = clip(1), masks(1), sentence(net, 1)
    other = torch.randn_like(frames)
    other[:, 1] = frames[:, 1]
    changed = 1 - shown
    changed[:, 1] = shown[:, 1]
    query = clip(0)
    want = net(*query, SIZES, text, net.encode_support(frames, padding, shown, text))
    assert_same(net(*query, SIZES, text, net.encode_support(other, padding, changed, text)), want, 0)
    shown[:, 1] = 0
    without = net(*query, SIZES, text, net.encode_support(frames, padding, shown, text))
    assert not torch.allclose(without["pred_masks"], want["pred_masks"], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["cma", "base"])
def test_a_shot_shown_twice_is_one_shot(variant: str) -> None:
    net = small_net(variant, use_dab=variant == "cma")
    shot, text, query = support(net, 1), sentence(net, 0), clip(0)
    assert_same(net(*query, SIZES, text, merge_shots([shot, shot])), net(*query, SIZES, text, shot))


@torch.no_grad()
def test_every_shot_counts_and_their_order_does_not(net: CMANet) -> None:
    first, second, text, query = support(net, 1), support(net, 2, s=5), sentence(net, 0), clip(0)
    both = net(*query, SIZES, text, merge_shots([first, second]))
    assert_same(net(*query, SIZES, text, merge_shots([second, first])), both)
    assert not torch.allclose(net(*query, SIZES, text, first)["pred_masks"], both["pred_masks"], atol=1e-2)


@torch.no_grad()
def test_shared_maps_and_a_prepared_support_change_nothing(net: CMANet) -> None:
    shot, query = support(net, 1), clip(0)
    maps = net.encode_query(*query)
    prepared = net.prepare_support(shot, maps.shapes)
    for seed in (3, 4):
        text = sentence(net, seed)
        assert_same(net(maps, None, SIZES, text, prepared), net(*query, SIZES, text, shot), 0)
    with pytest.raises(ValueError, match="prepared for"):
        net(query[0][..., :64], query[1][..., :64], SIZES, text, prepared)


@torch.no_grad()
def test_the_chosen_masks_are_those_of_the_surest_query(net: CMANet) -> None:
    text, shot, maps = sentence(net, 0), support(net, 1), net.encode_query(*clip(0))
    every = net(maps, None, SIZES, text, shot)
    net.share(maps)
    chosen = net(maps, None, SIZES, text, shot, chosen=True)
    torch.testing.assert_close(chosen["pred_logits"], every["pred_logits"])
    scores = every["pred_logits"].sigmoid().mean(1).amax(-1)
    torch.testing.assert_close(chosen["scores"], scores)
    assert chosen["chosen"].item() == scores.argmax()
    torch.testing.assert_close(chosen["pred_masks"], every["pred_masks"][:, :, scores.argmax()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_patterns_multiply_the_queries() -> None:
    net = small_net(num_patterns=3, queries=4)
    output = net(*clip(0), SIZES, sentence(net, 0), support(net, 1))
    assert output["pred_masks"].shape == (1, 3, 12, H // 4, W // 4)


def test_training_reaches_all_but_the_unused_parameters() -> None:
    net = small_net().train()
    output = net(*clip(0), SIZES, sentence(net, 0), support(net, 1))
    layers = [output, *output["aux_outputs"]]
    sum(layer[name].square().mean() for layer in layers for name in NAMES).backward()
    silent = {name for name, p in net.named_parameters() if p.requires_grad and p.grad is None}
    assert silent == {"support_qkv.query.weight", "support_qkv.query.bias"}
    assert not any(p.requires_grad for p in net.text_encoder.parameters())
    assert "reference_points" not in output


def test_the_watched_affinity_is_the_attention_to_the_object() -> None:
    """Against the full matrix by loops: its rows summed over the object's share of each support token."""
    net = small_net(watch_affinity=True, dropout=0.0).train()
    fused = [torch.randn(1, 2, 64, 4, 6), torch.randn(1, 2, 64, 2, 3)]
    shot = support(net, 1)
    prepared = net.prepare_support(shot, [(4, 6), (2, 3), (2, 2), (1, 1)])
    prepared.levels, attention = prepared.levels[:2], []
    net.affinity(fused, prepared, attention)
    for query, (keys, _values, share), found in zip(fused, prepared.levels, attention, strict=True):
        asked, seen = net.query_qkv.query(query[0]), query[:, 1]
        asked = asked.permute(0, 2, 3, 1).flatten(0, 2)
        own = [conv(seen)[0].flatten(1).T for conv in (net.query_qkv.Key, net.query_qkv.Value)]
        x = net.layer_norm(asked + (asked @ own[0].T / asked.shape[1] ** 0.5).softmax(1) @ own[1])
        weights = (x @ keys[0].T / x.shape[1] ** 0.5).softmax(1)
        torch.testing.assert_close(found.flatten(), weights @ share[0])
        assert share.min() >= 0
        assert 0 < share.max() <= 1
    assert "affinity" in net(*clip(0), SIZES, sentence(net, 0), shot)
    assert "affinity" not in net.eval()(*clip(0), SIZES, sentence(net, 0), shot)


def test_fresh_attention_to_the_support_is_a_similarity_where_asked() -> None:
    parts = {"backbone": build_backbone("tiny_resnet"), "text_encoder": build_text_encoder(TEXT)}
    net = CMANet(**parts, hidden=64, ffn=64, support_gain=6.0)
    torch.testing.assert_close(net.support_qkv.Key.weight, 6 * net.query_qkv.query.weight)
    plain = CMANet(**parts, hidden=64, ffn=64)
    assert not torch.equal(plain.support_qkv.Key.bias, plain.query_qkv.query.bias)


@torch.no_grad()
def test_half_precision_stays_close(net: CMANet) -> None:
    shot, text, query = support(net, 1), sentence(net, 0), clip(0)
    want = net(*query, SIZES, text, shot)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(*query, SIZES, sentence(net, 0), support(net, 1))
    assert all(got[name].dtype == torch.float32 for name in NAMES)
    assert (got["pred_boxes"] - want["pred_boxes"]).abs().max() < 0.02
    assert (got["pred_masks"] - want["pred_masks"]).abs().mean() < 0.05 * want["pred_masks"].std()


def test_initial_heads_predict_background_with_small_boxes() -> None:
    net = CMANet(backbone=build_backbone("tiny_resnet"), text_encoder=build_text_encoder(TEXT), hidden=64, ffn=64)
    assert torch.allclose(net.class_embed[0].bias.sigmoid(), torch.tensor(0.01))
    assert net.bbox_embed[0].layers[-1].bias.tolist() == [0, 0, -2, -2]
    assert net.bbox_embed[1].layers[-1].bias.tolist() == [0, 0, 0, 0]
    assert not net.transformer.encoder.layers[0].self_attn.sampling_offsets.weight.any()


@torch.no_grad()
def test_clear_errors() -> None:
    net = small_net("base", use_dab=False)
    text = sentence(net, 0)
    with pytest.raises(ValueError, match="as many support frames"):
        net(*clip(0), SIZES, text, support(net, 1, s=2))
    with pytest.raises(ValueError, match="do not match"):
        net.encode_support(*clip(1), masks(1, s=2), text)
    with pytest.raises(InputError, match="did you mean 'self'"):
        small_net("selfcma")
    with pytest.raises(InputError, match="no RoBERTa model"):
        build_text_encoder("/nowhere/roberta")
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer("/nowhere/tokenizer")


@torch.no_grad()
def test_a_query_is_answered_in_chunks(net: CMANet) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 3, 40, 60), dtype=np.uint8)
    shown = rng.random((3, 40, 60)) > 0.5
    shot = inference.encode_shot(net, frames[:3], shown, sentence(net, 1), 64)
    text = sentence(net, 0)
    (whole,) = inference.answer_queries(net, frames, [text], shot, chunk=3, short_side=64)
    prob = inference.input_probabilities(whole)
    assert prob.shape == (5, 64, 96)
    assert whole.scores.shape == (2, 5)
    assert whole.confidence == pytest.approx(whole.scores.amax(1).mean().item())
    (last,) = inference.answer_queries(net, frames[3:], [text], shot, chunk=3, short_side=64)
    assert torch.equal(prob[3:], inference.input_probabilities(last))
    assert inference.masks_at(prob, (40, 60)).shape == (5, 40, 60)


@pytest.mark.parametrize(("size", "short", "wanted"), [((36, 54), 24, (24, 36)), ((101, 57), 60, (106, 60))])
def test_resize_matches_pil(size: tuple[int, int], short: int, wanted: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, *size), dtype=np.uint8)
    got = query_inference.resize_short_side(frames, short)
    assert got.shape == (2, 3, *wanted)
    image = Image.fromarray(frames[1].transpose(1, 2, 0)).resize(wanted[::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(got[1].transpose(1, 2, 0), np.asarray(image))
