"""Backbones: names, sizes and numbers against torchvision's own networks, and loading of published weights."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.video.swin_transformer import SwinTransformer3d

from fewref.episodes.errors import InputError
from fewref.methods.layers.backbone import BACKBONES, build_backbone, load_pretrained

SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)}
WIDTHS = {
    "resnet50": (256, 512, 1024, 2048),
    "resnet101": (256, 512, 1024, 2048),
    "tiny_resnet": (24, 48, 96, 160),
    "swin_t_p4w7": (96, 192, 384, 768),
    "swin_s_p4w7": (96, 192, 384, 768),
    "swin_b_p4w7": (128, 256, 512, 1024),
    "swin_l_p4w7": (192, 384, 768, 1536),
    "video_swin_t_p4w7": (96, 192, 384, 768),
    "video_swin_s_p4w7": (96, 192, 384, 768),
    "video_swin_b_p4w7": (128, 256, 512, 1024),
}


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every floating tensor far from its start value, so that a tensor left out of a computation shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.3 * noise.abs() if tensor.ndim == 1 and "bias" not in name else 0.3 * noise)
    return module.eval()


def frames(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def our_name(name: str, stage_step: int) -> str | None:
    """Name of a tensor of torchvision's (video) Swin in ours; None for its classifier."""
    head, _, rest = name.partition(".")
    if head != "features":
        return name if head == "patch_embed" else None
    index, rest = rest.split(".", 1)
    index = int(index)
    if stage_step == 1:  # 2-D: the patch embedding is features.0
        if index == 0:
            return f"patch_embed.{'proj' if rest[0] == '0' else 'norm'}.{rest[2:]}"
        index -= 1
    if index % 2:
        return f"layers.{index // 2}.downsample.{rest}" if stage_step else f"downsamples.{index // 2}.{rest}"
    return f"layers.{index // 2}.blocks.{rest.replace('mlp.0', 'mlp.fc1').replace('mlp.3', 'mlp.fc2')}"


def test_every_name_is_built_with_its_widths():
    assert set(BACKBONES) == set(WIDTHS)
    for name, widths in WIDTHS.items():
        with torch.device("meta"):
            backbone = build_backbone(name)
        assert backbone.channels == widths
        assert backbone.temporal == name.startswith("video")


@pytest.mark.parametrize(
    ("name", "count"),
    [("swin_l_p4w7", 194_998_164), ("video_swin_t_p4w7", 27_844_326), ("video_swin_b_p4w7", 87_630_792)],
)
def test_parameter_counts_are_the_published_ones(name, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build_backbone(name).parameters()) == count


def test_an_unknown_name_is_refused_with_a_hint():
    with pytest.raises(InputError, match="swin_t_p4w7"):
        build_backbone("swin_t_p4w8")
    with pytest.raises(InputError, match="groups"):
        build_backbone("tiny_resnet", channels=(10, 20, 30, 40))


@pytest.mark.parametrize("name", ["resnet50", "tiny_resnet", "swin_t_p4w7", "video_swin_t_p4w7"])
def test_strides_round_up(name):
    backbone = build_backbone(name, **(SMALL if "swin" in name else {})).eval()
    with torch.no_grad():
        maps = backbone(frames(2, 37, 70), clip_frames=2)
    sizes = [(10, 18), (5, 9), (3, 5), (2, 3)]
    assert [tuple(item.shape) for item in maps] == [
        (2, width, *size) for width, size in zip(backbone.channels, sizes, strict=True)
    ]


def test_resnet_equals_torchvision_in_evaluation_and_stays_frozen_in_training():
    reference = randomised(torchvision.models.resnet50(weights=None))
    state = {name: item for name, item in reference.state_dict().items() if not name.startswith("fc.")}
    state = {name: item for name, item in state.items() if not name.endswith("num_batches_tracked")}
    ours = build_backbone("resnet50").train()
    assert set(ours.state_dict()) == set(state)
    ours.load_state_dict(state)
    x = frames(1, 40, 64)
    with torch.no_grad():
        maps = ours(x, clip_frames=1)
        y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        for stage, actual in enumerate(maps, 1):
            y = getattr(reference, f"layer{stage}")(y)
            torch.testing.assert_close(actual, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    assert all(torch.equal(item, state[name]) for name, item in ours.state_dict().items())
    assert not any("bn" in name for name, _ in ours.named_parameters())


def test_swin_equals_torchvision_where_every_map_exceeds_a_window():
    reference = randomised(SwinTransformer([4, 4], **SMALL, window_size=[7, 7], num_classes=1))
    ours = build_backbone("swin_t_p4w7", **SMALL).eval()
    state = {our_name(name, 1): item for name, item in reference.state_dict().items()}
    state = {name: item for name, item in state.items() if name}
    state = {name: item.view(49, 49) if name.endswith("index") else item for name, item in state.items()}
    norms = {name for name in ours.state_dict() if name.startswith("norm")}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert set(missing) == norms
    assert not unexpected
    x, y = frames(1, 256, 288), None
    with torch.no_grad():
        y = reference.features[0](x)
        for stage, actual in enumerate(ours(x, clip_frames=1)):
            y = reference.features[2 * stage + 1](y)
            expected = getattr(ours, f"norm{stage}")(y).permute(0, 3, 1, 2)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            y = reference.features[2 * stage + 2](y) if stage < 3 else y


def test_swin_shifts_on_a_map_smaller_than_a_window():
    backbone = randomised(build_backbone("swin_t_p4w7", **SMALL))
    block = backbone.layers[0]["blocks"][1]
    x = torch.randn(1, 5, 6, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = block._attn(x)
        # Padded to the window of 7 and shifted by 3, rows 0..2 and rows 3..6 are apart: so are the columns.
        changed = x.clone()
        changed[:, 4, 4] += 1
        moved = (block._attn(changed) - expected).abs().amax(-1)[0]
    assert (moved[3:, 3:] > 1e-6).all()
    assert (moved[:3] < 1e-6).all()
    assert (moved[:, :3] < 1e-6).all()


@pytest.mark.parametrize(("clip", "height", "width"), [(3, 40, 68), (9, 36, 64)])
def test_video_swin_equals_torchvision(clip, height, width):
    reference = randomised(SwinTransformer3d([1, 4, 4], **SMALL, window_size=[8, 7, 7], num_classes=1))
    ours = build_backbone("video_swin_t_p4w7", **SMALL).eval()
    state = {our_name(name, 0): item for name, item in reference.state_dict().items()}
    ours.load_state_dict({name: item for name, item in state.items() if name})
    x = frames(2 * clip, height, width)
    with torch.no_grad():
        maps = ours(x, clip_frames=clip)
        y = reference.patch_embed(x.unflatten(0, (2, clip)).transpose(1, 2))
        for stage, actual in enumerate(maps):
            y = reference.features[2 * stage](y)
            expected = y.flatten(0, 1).permute(0, 3, 1, 2)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
            y = reference.features[2 * stage + 1](y) if stage < 3 else y


@pytest.mark.parametrize("name", ["tiny_resnet", "swin_t_p4w7", "video_swin_t_p4w7"])
def test_frames_meet_in_temporal_backbones_only_and_clips_never(name):
    backbone = randomised(build_backbone(name, **(SMALL if "swin" in name else {})))
    x = frames(6, 32, 48)
    changed = x.clone()
    changed[1] += 1
    with torch.no_grad():
        moved = (backbone(x, clip_frames=3)[3] - backbone(changed, clip_frames=3)[3]).abs().amax((1, 2, 3)) > 1e-6
    assert moved.tolist() == [backbone.temporal, True, backbone.temporal, False, False, False]


def test_video_swin_refuses_a_part_of_a_clip():
    with pytest.raises(ValueError, match="5 frames are not whole clips of 3"):
        build_backbone("video_swin_t_p4w7", **SMALL)(frames(5, 32, 32), clip_frames=3)


def test_tiny_resnet_is_small_and_every_weight_learns():
    backbone = build_backbone("tiny_resnet")
    assert 0.4e6 < sum(parameter.numel() for parameter in backbone.parameters()) < 0.8e6
    assert not list(backbone.buffers())
    sum(item.square().mean() for item in backbone(frames(2, 96, 128), clip_frames=2)).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())


def test_published_video_weights_lose_their_prefix_and_temporal_kernel(tmp_path):
    reference = randomised(build_backbone("video_swin_t_p4w7", **SMALL))
    state = {f"backbone.{name}": item for name, item in reference.state_dict().items()}
    kernel = torch.randn(8, 3, 2, 4, 4)
    state["backbone.patch_embed.proj.weight"] = kernel
    state |= {"backbone.norm.weight": torch.ones(64), "cls_head.fc_cls.weight": torch.ones(4, 64)}
    torch.save({"state_dict": state}, tmp_path / "video.pth")
    ours = build_backbone("video_swin_t_p4w7", **SMALL)
    load_pretrained(ours, tmp_path / "video.pth")
    expected = {**reference.state_dict(), "patch_embed.proj.weight": kernel[:, :, :1] + kernel[:, :, 1:]}
    assert all(torch.equal(item, expected[name]) for name, item in ours.state_dict().items())


def test_published_image_weights_lose_their_classifier_and_norms_stay_fresh(tmp_path):
    reference = randomised(build_backbone("swin_t_p4w7", **SMALL))
    state = {name: item for name, item in reference.state_dict().items() if not name.startswith("norm")}
    extra = {"norm.weight": torch.ones(64), "head.weight": torch.ones(9, 64)}
    extra["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    torch.save({"model": state | extra}, tmp_path / "swin.pth")
    ours = build_backbone("swin_t_p4w7", **SMALL)
    load_pretrained(ours, tmp_path / "swin.pth")
    assert all(torch.equal(ours.state_dict()[name], item) for name, item in state.items())
    assert torch.equal(ours.norm3.weight, torch.ones(64))


def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save(build_backbone("tiny_resnet").state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(InputError, match="looks like backbone tiny_resnet, the network is backbone swin of width 8"):
        load_pretrained(build_backbone("swin_t_p4w7", **SMALL), tmp_path / "tiny.pth")
