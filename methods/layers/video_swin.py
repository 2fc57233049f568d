"""Video-Swin backbone with temporal patches of one frame, from torchvision's 3-D blocks (cma.md section 5).

Its windows span frames, so the features of a frame depend on the clip around it. Outputs are not normalised.
"""

from __future__ import annotations

from timm.layers import Mlp
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torchvision.models.video.swin_transformer import PatchEmbed3d, ShiftedWindowAttention3d

from fewref.methods.layers.swin import SWIN_SIZES, drop_path_rates, init_linear

VIDEO_SWIN_SIZES: dict[str, dict[str, object]] = {size: {**SWIN_SIZES[size], "drop_path_rate": 0.2} for size in "tsb"}


class VideoSwinBlock(SwinTransformerBlock):
    """torchvision's block over (B,T,h,w,C); its feed-forward part is timm's, whose names (fc1, fc2) are upstream's."""

    def __init__(
        self, dim: int, num_heads: int, window: tuple[int, ...], shifted: bool, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            window_size=list(window),
            shift_size=[size // 2 if shifted else 0 for size in window],
            mlp_ratio=mlp_ratio,
            stochastic_depth_prob=drop_path,
            attn_layer=ShiftedWindowAttention3d,
        )
        self.mlp = Mlp(dim, int(dim * mlp_ratio))


class VideoSwin(nn.Module):
    """Video-Swin transformer without temporal down-sampling: T frames in, four maps for each of them out."""

    temporal = True

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: tuple[int, int, int] = (8, 7, 7),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        self.channels = tuple(embed_dim * 2**stage for stage in range(4))
        self.patch_embed = PatchEmbed3d([1, 4, 4], embed_dim=embed_dim, norm_layer=nn.LayerNorm)
        rates = drop_path_rates(drop_path_rate, depths)
        self.layers = nn.ModuleList()
        for stage, (width, heads) in enumerate(zip(self.channels, num_heads, strict=True)):
            blocks = [
                VideoSwinBlock(width, heads, tuple(window_size), bool(j % 2), mlp_ratio, rate)
                for j, rate in enumerate(rates[stage])
            ]
            self.layers.append(nn.ModuleDict({"blocks": nn.ModuleList(blocks)}))
        self.downsamples = nn.ModuleList(PatchMerging(width) for width in self.channels[:3])
        init_linear(self)

    def forward(self, frames: Tensor, clip_frames: int) -> list[Tensor]:
        """Features of whole clips.

        frames float (B*T,3,H,W), normalised, clip after clip; clip_frames = T.
        Returns four maps float (B*T,C,ceil(H/s),ceil(W/s)), s = 4, 8, 16, 32. Raises ValueError where T does not
        divide the number of frames.
        """
        if frames.shape[0] % clip_frames:
            raise ValueError(f"{frames.shape[0]} frames are not whole clips of {clip_frames}")
        clips = frames.unflatten(0, (-1, clip_frames)).transpose(1, 2)  # (B,3,T,H,W)
        x, maps = self.patch_embed(clips), []  # (B,T,h,w,C)
        for stage, layer in enumerate(self.layers):
            for block in layer["blocks"]:
                x = block(x)
            maps.append(x.flatten(0, 1).permute(0, 3, 1, 2).contiguous())
            if stage < 3:
                x = self.downsamples[stage](x)
        return maps
