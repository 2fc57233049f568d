"""What networks do differently without gradients on a CPU changes results by rounding alone.

Each network is held to itself with the reference forced, which takes every operator by its definition and no shortcut.
"""

from __future__ import annotations

import pytest
import torch
from fill import fill_by_name
from test_cma_net import TEXT, masks
from torch import Tensor, nn

from fewref.kernels import affinity, dispatch, linear
from fewref.methods.cma.net import CMANet
from fewref.methods.layers import attention, piecewise
from fewref.methods.layers.attention import Attention
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.layers.query_net import QueryNet
from fewref.methods.referformer.net import ReferFormerNet
from fewref.methods.text import build_text_encoder
from fewref.methods.tf2.net import TF2Net

SIZE = (2, 3, 3, 64, 96)  # clips, frames, channels, height and width


@pytest.fixture(autouse=True)
def every_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds so low that small networks take all shortcuts, more than once."""
    monkeypatch.setattr(linear, "WORTH", 1)
    monkeypatch.setattr(affinity, "ROWS", 50)
    monkeypatch.setattr(piecewise, "CHUNK", 37)
    monkeypatch.setattr(piecewise, "SMALL", 1)


def build(kind: type[QueryNet], backbone: str = "tiny_resnet", **options: object) -> QueryNet:
    text = build_text_encoder(TEXT)
    options = {"hidden": 64, "ffn": 64, "encoder_layers": 2, "decoder_layers": 2, "freeze_backbone": False, **options}
    return fill_by_name(kind(backbone=build_backbone(backbone), text_encoder=text, **options)).eval()


def given(net: QueryNet, padded: bool) -> tuple:
    """Frames, padding, sizes and sentences of two clips, of which the second may be smaller and has fewer words."""
    generator = torch.Generator().manual_seed(0)
    frames, padding = torch.randn(SIZE, generator=generator), torch.zeros(2, 3, 64, 96, dtype=torch.bool)
    sizes = torch.tensor([[64, 96], [64, 96]])
    if padded:
        sizes[1] = torch.tensor([50, 70])
        padding[1, :, 50:], padding[1, :, :, 70:] = True, True
        frames = frames.masked_fill(padding[:, :, None], 0)
    ids, attention_mask = torch.randint(5, 40, (2, 6), generator=generator), torch.ones(2, 6, dtype=torch.long)
    attention_mask[1, 4:] = 0
    return frames, padding, sizes, net.encode_text(ids, attention_mask)


def outputs(net: QueryNet, padded: bool, chosen: bool) -> dict[str, Tensor]:
    frames, padding, sizes, text = given(net, padded)
    maps = net.encode_query(frames, padding)
    if chosen:
        net.share(maps)
    more = ()
    if isinstance(net, CMANet):
        support = net.encode_support(frames.flip(1), padding, masks(1, b=2), text)
        more = (support,)
    if isinstance(net, TF2Net):
        return net.decode(net.encode_stream(frames, padding, text), sizes, text, None, chosen=chosen)
    return net(maps, None, sizes, text, *more, chosen=chosen)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (CMANet, {}),
        (CMANet, {"backbone": "resnet50"}),
        (CMANet, {"variant": "self", "use_dab": False}),
        (CMANet, {"variant": "base", "mask_layers": 2, "coordinates": False}),
        (ReferFormerNet, {}),
        (TF2Net, {}),
    ],
)
def test_a_network_is_itself_by_the_definitions(kind: type, options: dict, padded: bool) -> None:
    net = build(kind, **options)
    with torch.no_grad(), dispatch.using("reference"):
        true = outputs(net, padded, chosen=False)
    with torch.inference_mode():
        every, chosen = outputs(net, padded, chosen=False), outputs(net, padded, chosen=True)
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        scale = true[name].abs().max().item()
        torch.testing.assert_close(every[name], true[name], rtol=1e-4, atol=2e-5 * scale)
    assert torch.equal(chosen["chosen"], true["pred_logits"].sigmoid().mean(1).amax(-1).argmax(1))
    of_clip = [true["pred_masks"][clip, :, query] for clip, query in enumerate(chosen["chosen"])]
    scale = true["pred_masks"].abs().max().item()
    torch.testing.assert_close(chosen["pred_masks"], torch.stack(of_clip), rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("keys", [3, 20])
@torch.no_grad()
def test_attention_is_pytorchs(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(64, 8).eval(), nn.MultiheadAttention(64, 8, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    nn.init.normal_(ours.in_proj_bias), nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 50, 64), torch.randn(2, keys, 64), torch.randn(2, keys, 64)
    padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2]])
    few = []
    real = Attention._to_few
    monkeypatch.setattr(attention.Attention, "_to_few", lambda *given: few.append(1) or real(*given))
    for mask in (None, padding):
        wanted = theirs(query, key, value, key_padding_mask=mask, need_weights=False)[0]
        torch.testing.assert_close(ours(query, key, value, mask), wanted, rtol=1e-4, atol=1e-5)
        with dispatch.using("reference"):
            torch.testing.assert_close(ours(query, key, value, mask), wanted, rtol=1e-4, atol=1e-5)
    assert len(few) == (2 if keys * 8 < 64 else 0)
