"""2-D Swin backbone with a layer norm on each output, from timm's blocks (cma.md section 5).

timm's block differs from the one that upstream weights were trained with in two points, mended here: it pads after the
cyclic shift in place of before it, and by default it drops the shift where a map is no larger than a window.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging

SWIN_SIZES: dict[str, dict[str, object]] = {
    "t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2},
    "b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3},
    "l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.3},
}


class SwinBlock(SwinTransformerBlock):
    """timm's block which pads to whole windows before the cyclic shift and shifts whatever the size of the map."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__(
            dim,
            input_resolution=(window, window),  # of no effect: the mask is made for each input
            num_heads=num_heads,
            window_size=window,
            shift_size=shift,
            always_partition=True,
            dynamic_mask=True,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )
        # Upstream state dicts hold the index, so it is registered anew as a persistent buffer.
        self.attn.register_buffer("relative_position_index", self.attn.relative_position_index)

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(x)[:, :height, :width]


class Swin(nn.Module):
    """Swin transformer: patches of 4, windows shifted in odd blocks, four normalised outputs."""

    temporal = False

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        self.channels = tuple(embed_dim * 2**stage for stage in range(4))
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=4,
            embed_dim=embed_dim,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.layers = nn.ModuleList()
        for stage, (width, heads) in enumerate(zip(self.channels, num_heads, strict=True)):
            blocks = [
                SwinBlock(width, heads, window_size, (j % 2) * (window_size // 2), mlp_ratio, rate)
                for j, rate in enumerate(rates[stage])
            ]
            parts = {"blocks": nn.ModuleList(blocks)}
            if stage < 3:
                parts["downsample"] = PatchMerging(width)
            self.layers.append(nn.ModuleDict(parts))
            self.add_module(f"norm{stage}", nn.LayerNorm(width))
        init_linear(self)

    def forward(self, frames: Tensor, clip_frames: int = 1) -> list[Tensor]:
        """frames float (N,3,H,W), normalised -> four maps float (N,C,ceil(H/s),ceil(W/s)), s = 4, 8, 16, 32."""
        x, maps = self.patch_embed(frames), []  # (N,h,w,C)
        for stage, layer in enumerate(self.layers):
            for block in layer["blocks"]:
                x = block(x)
            maps.append(getattr(self, f"norm{stage}")(x).permute(0, 3, 1, 2).contiguous())
            if "downsample" in layer:
                x = layer["downsample"](x)
        return maps


def drop_path_rates(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Drop-path probability of every block by stage, growing linearly over the depth from 0 to `last`."""
    total, rates, done = sum(depths), [], 0
    for depth in depths:
        rates.append([last * block / max(total - 1, 1) for block in range(done, done + depth)])
        done += depth
    return rates


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights (standard deviation 0.02) and zero biases for every linear layer, as the paper does."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
