"""Image backbones by name, each a module `(N,3,H,W) -> four feature maps at strides 4, 8, 16 and 32`.

Every backbone has `channels` (width of each map), `temporal` (whether the frames of a clip see each other) and
`forward(frames, clip_frames)`. Parameter names are those that upstream checkpoints carry behind `backbone.0.body.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from timm.layers import GroupNorm
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from fewref.episodes.errors import InputError, near
from fewref.kernels.dispatch import plain
from fewref.methods.layers.swin import SWIN_SIZES, Swin
from fewref.methods.layers.video_swin import VIDEO_SWIN_SIZES, VideoSwin
from fewref.methods.weights import load_checkpoint, load_strict

STAGES = ("layer1", "layer2", "layer3", "layer4")


class FrozenResNet(IntermediateLayerGetter):
    """torchvision's bottleneck ResNet (v1.5) without pooling and classifier; batch norm is four buffers (cma.md 3.2).

    name: a torchvision builder such as "resnet50". Names of the state dict: conv1, bn1, layer1.0.conv1, ...
    """

    channels = (256, 512, 1024, 2048)
    temporal = False

    def __init__(self, name: str) -> None:
        network = torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)
        super().__init__(network, {stage: stage for stage in STAGES})

    def forward(self, frames: Tensor, clip_frames: int = 1) -> list[Tensor]:
        """frames float (N,3,H,W), normalised -> four maps float (N,C,ceil(H/s),ceil(W/s)), s = 4, 8, 16, 32.

        Without gradients the norms are folded into the convolutions, which then run with the channels last: on a CPU
        three times as fast, equal within rounding.
        """
        if torch.is_grad_enabled() or plain():
            return list(super().forward(frames).values())
        x = frames.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(folded(self.conv1, self.bn1, x).relu_())
        maps = []
        for stage in STAGES:
            for block in self[stage]:
                x = _bottleneck(block, x)
            maps.append(x)
        return maps


def folded(convolution: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor) -> Tensor:
    """norm(convolution(x)) as one convolution; preparing its weights takes little beside using them."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = (convolution.weight * scale[:, None, None, None]).contiguous(memory_format=torch.channels_last)
    shift = norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, shift, convolution.stride, convolution.padding, convolution.dilation)


def _bottleneck(block: nn.Module, x: Tensor) -> Tensor:
    """A block of torchvision's ResNet with its norms folded."""
    kept = folded(*block.downsample, x) if block.downsample is not None else x
    x = folded(block.conv1, block.bn1, x).relu_()
    x = folded(block.conv2, block.bn2, x).relu_()
    return folded(block.conv3, block.bn3, x).add_(kept).relu_()


class TinyResNet(nn.Module):
    """A residual network for training from scratch on small clips: one basic block per stage (timm's ResNet).

    Group norm in place of batch norm, since a batch holds few frames and these resemble each other.
    """

    temporal = False

    def __init__(self, channels: tuple[int, int, int, int] = (24, 48, 96, 160), groups: int = 8) -> None:
        super().__init__()
        if any(width % groups for width in channels):
            raise InputError(f"tiny_resnet: channels {channels} are no multiples of groups={groups}; choose others")
        self.channels = tuple(channels)
        network = ResNet(
            BasicBlock,
            layers=(1, 1, 1, 1),
            channels=self.channels,
            stem_type="deep",
            stem_width=16,
            norm_layer=partial(GroupNorm, num_groups=groups),
            zero_init_last=False,
        )
        self.stem = nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool)
        for stage in STAGES:
            self.add_module(stage, getattr(network, stage))

    def forward(self, frames: Tensor, clip_frames: int = 1) -> list[Tensor]:
        """frames float (N,3,H,W), normalised -> four maps float (N,C,ceil(H/s),ceil(W/s)), s = 4, 8, 16, 32."""
        x, maps = self.stem(frames), []
        for stage in STAGES:
            x = getattr(self, stage)(x)
            maps.append(x)
        return maps


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet50": partial(FrozenResNet, "resnet50"),
    "resnet101": partial(FrozenResNet, "resnet101"),
    "tiny_resnet": TinyResNet,
    **{f"swin_{size}_p4w7": partial(Swin, **options) for size, options in SWIN_SIZES.items()},
    **{f"video_swin_{size}_p4w7": partial(VideoSwin, **options) for size, options in VIDEO_SWIN_SIZES.items()},
}


def freeze_first_stage(backbone: nn.Module) -> None:
    """Of a residual network, let only the stages from stride 8 on have gradients; other backbones are left alone."""
    if hasattr(backbone, STAGES[-1]):
        for name, parameter in backbone.named_parameters():
            if not name.startswith(STAGES[1:]):
                parameter.requires_grad_(False)


# Parts of published classifiers that a backbone has no use for.
CLASSIFIER_PARTS = ("fc.*", "head.*", "cls_head.*", "norm.*", "*.num_batches_tracked", "*.attn_mask")


def build_backbone(name: str, **options: object) -> nn.Module:
    """Build a backbone with fresh weights; `options` go to its constructor. Raises InputError for an unknown name."""
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}: {near(name, BACKBONES)}")
    return BACKBONES[name](**options)


def load_pretrained(backbone: nn.Module, path: Path) -> None:
    """Fill a backbone with published classification weights: ImageNet or, for Video-Swin, Kinetics.

    The temporal patch kernel of Video-Swin is summed over time, since ours spans one frame (cma.md section 5); norms of
    outputs, which classifiers lack, keep their values. Raises InputError where the file does not fit.
    """
    state = {name.removeprefix("backbone."): tensor for name, tensor in load_checkpoint(path).items()}
    patch = state.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 5:
        state["patch_embed.proj.weight"] = patch.sum(dim=2, keepdim=True)
    own = backbone.state_dict()
    fresh = {name: own[name] for name in own if re.fullmatch(r"norm\d\.\w+", name)}
    load_strict(backbone, {**fresh, **state}, CLASSIFIER_PARTS, path)
