"""What CMA, ReferFormer and TF2 share: backbone, sentence, early fusion, deformable transformer, heads and masks.

The parameter names are those of upstream checkpoints of all three. Sources: `wjn922/ReferFormer`,
`hengliusky/Few_shot_RVOS`; numbers in comments are sections of the CMA specification. Upstream serves one clip at a
time; here every item of a batch has a sentence of its own, and with one item the results are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewref.kernels.dispatch import plain
from fewref.methods.layers.deformable_decoder import Decoded, DeformableTransformer, refine
from fewref.methods.layers.fpn import CrossModalFPN
from fewref.methods.layers.fusion import VisionLanguageFusion
from fewref.methods.layers.mask_head import build_controller, layer_masks
from fewref.methods.layers.mlp import MLP, FeatureResizer, Linear
from fewref.methods.layers.piecewise import whole
from fewref.methods.layers.position import sine_positions_1d, sine_positions_2d
from fewref.methods.text import TextFeatures, encode_sentences

LEVELS = 4  # strides 8, 16, 32 and 64


@dataclass
class QueryMaps:
    """What of a query clip does not depend on the sentence; N = B*T.

    stride4: the raw backbone map (N,C4,h,w), None once shared; projected: four maps (B,T,C,h,w) at strides 8 to 64;
    masks bool (N,h,w) and positions float32 (N,C,h,w): five each, strides 4 to 64. finest: what the pixel decoder makes
    of `stride4` before it sees the words, where `QueryNet.share` has done that for several sentences.
    """

    stride4: Tensor | None
    projected: list[Tensor]
    masks: list[Tensor]
    positions: list[Tensor]
    finest: Tensor | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Sizes (h,w) of the four levels, finest first."""
        return [tuple(item.shape[-2:]) for item in self.projected]


class _Body(nn.Module):
    """Gives the backbone the name it has in upstream checkpoints, `backbone.0.body`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body


class QueryNet(nn.Module):
    """A clip and a sentence to boxes and masks of object queries: all parts but the path between fusion and answer.

    backbone: from `build_backbone`; text_encoder: from `build_text_encoder`. queries: per frame (times num_patterns if
    that is not 0). use_dab: queries are anchor boxes (DAB-DETR). The default sizes are upstream's; names and shapes of
    the state dict equal upstream's. classes: K of the class head. refined=False: boxes are not refined from layer to
    layer, and all layers share their heads; not with use_dab. mask_dim: channels of the mask features, `hidden` if
    None; mask_channels, mask_layers, coordinates: width and depth of the tiny mask networks, and whether they see where
    a pixel lies. Frozen parts get no gradient, but in train mode a frozen text encoder keeps its dropout, as upstream.
    classify_valid: whether the matching of its training counts the class at valid frames alone.
    """

    classify_valid = False

    def __init__(
        self,
        *,
        backbone: nn.Module,
        text_encoder: nn.Module,
        use_dab: bool = True,
        hidden: int = 256,
        heads: int = 8,
        ffn: int = 2048,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        points: int = 4,
        queries: int = 5,
        classes: int = 1,
        refined: bool = True,
        dropout: float = 0.1,
        mask_dim: int | None = None,
        mask_channels: int = 8,
        mask_layers: int = 3,
        coordinates: bool = True,
        num_patterns: int = 0,
        freeze_backbone: bool = True,
        freeze_text: bool = True,
    ) -> None:
        super().__init__()
        self.use_dab, self.refined, self.coordinates = use_dab, refined, coordinates
        self.mask_channels, self.mask_layers = mask_channels, mask_layers
        self.hidden, self.queries, self.num_patterns = hidden, queries, num_patterns
        self.freeze_backbone, self.freeze_text = freeze_backbone, freeze_text
        # The order of the blocks is that of upstream's state dict: tied names are listed under the first (4).
        self.transformer = DeformableTransformer(
            channels=hidden,
            heads=heads,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            ffn=ffn,
            dropout=dropout,
            levels=LEVELS,
            points=points,
            use_dab=use_dab,
            refined=refined,
        )
        if refined:
            self.class_embed = nn.ModuleList(Linear(hidden, classes) for _ in range(decoder_layers))
            self.bbox_embed = self.transformer.decoder.bbox_embed
        else:
            self.class_embed = nn.ModuleList([Linear(hidden, classes)] * decoder_layers)
            self.bbox_embed = nn.ModuleList([MLP(hidden, hidden, 4, 3)] * decoder_layers)
        if use_dab:
            self.tgt_embed = nn.Embedding(queries, hidden)
            self.refpoint_embed = nn.Embedding(queries, 4)
            if num_patterns:
                self.patterns_embed = nn.Embedding(num_patterns, hidden)
        else:
            self.query_embed = nn.Embedding(queries, hidden)
        self.input_proj = _projections(backbone.channels, hidden)
        self.backbone = nn.Sequential(_Body(backbone))
        self.text_encoder = text_encoder
        self.resizer = FeatureResizer(text_encoder.config.hidden_size, hidden, dropout)
        self.fusion_module = VisionLanguageFusion(hidden, heads)
        mask_dim = mask_dim or hidden
        self.pixel_decoder = CrossModalFPN((backbone.channels[0], *[hidden] * 3), hidden, mask_dim, heads, ffn, dropout)
        self.controller = build_controller(hidden, mask_dim, mask_channels, mask_layers, coordinates)
        self._reset_heads()
        self.backbone.requires_grad_(not freeze_backbone)
        self.text_encoder.requires_grad_(not freeze_text)

    def _reset_heads(self) -> None:
        for layer in self.class_embed:
            nn.init.constant_(layer.bias, -math.log(99))  # probability 0.01, as focal loss wants
        for mlp in self.bbox_embed:
            nn.init.zeros_(mlp.layers[-1].weight)
            nn.init.zeros_(mlp.layers[-1].bias)
        nn.init.constant_(self.bbox_embed[0].layers[-1].bias[2:], -2.0)

    def encode_text(self, ids: Tensor, attention: Tensor) -> TextFeatures:
        """Token ids and attention (1 on tokens), both int64 (B,L) -> features of width `hidden`."""
        words, pooled = encode_sentences(self.text_encoder, ids, attention, self.freeze_text)
        return TextFeatures(self.resizer(words), attention != 1, self.resizer(pooled))

    def encode_query(self, frames: Tensor, padding: Tensor) -> QueryMaps:
        """frames float (B,T,3,H,W), normalised and zero on padding; padding bool (B,T,H,W), True right and below."""
        maps = self.backbone_maps(frames)
        projected = [item.unflatten(0, frames.shape[:2]) for item in self.project(maps)]
        sizes = [item.shape[-2:] for item in (maps[0], *projected)]
        full = padding.flatten(0, 1)[:, None].float()
        masks = [F.interpolate(full, size)[:, 0].bool() for size in sizes]
        positions = [self._positions(mask) for mask in masks]
        return QueryMaps(maps[0], projected, masks, positions)

    def _positions(self, mask: Tensor) -> Tensor:
        """Positions (N,C,h,w) of masks bool (N,h,w), one memory for all frames where these are equal."""
        if torch.is_grad_enabled() or plain() or not bool((mask == mask[:1]).all()):
            return sine_positions_2d(mask, self.hidden)
        return sine_positions_2d(mask[:1], self.hidden).expand(len(mask), -1, -1, -1)

    def share(self, maps: QueryMaps) -> None:
        """Do what the pixel decoder does before it sees a sentence now, for all sentences asked about the clip; the raw
        map is then let go."""
        batch = maps.projected[0].shape[0]
        maps.finest = self.pixel_decoder.look_around(1, maps.stride4, maps.masks[0], maps.positions[0], batch)
        maps.stride4 = None

    def answer(
        self,
        maps: QueryMaps,
        decoded: Decoded,
        text: TextFeatures,
        sizes: Tensor,
        chosen: bool = False,
    ) -> dict:
        """Boxes and masks of every query in every frame, from what the transformer made of the clip.

        sizes int (B,2): the unpadded input (H,W). Returns pred_logits (B,T,Q,K), pred_boxes (B,T,Q,4) cxcywh in [0,1],
        pred_masks (B,T,Q,h,w) logits at stride 4; aux_outputs, the same of the earlier decoder
        layers; in eval mode reference_points (B,T,Q,2), the centres which the last layer started from.

        chosen: of the last layer only what a prediction takes: pred_logits, scores (B,Q), the mean of each query's
        probability over the frames, chosen (B,), the query with the highest, and pred_masks (B,T,h,w), its masks.
        """
        b, t = maps.projected[0].shape[:2]
        sizes = sizes.repeat_interleave(t, 0)
        if chosen:
            return self._answer_chosen(maps, decoded, text, sizes)
        layers = self._predict(decoded, self.pixel_decoder(*self._of_decoder(maps, decoded, text)), sizes)
        layers = [{name: item.unflatten(0, (b, t)) for name, item in layer.items()} for layer in layers]
        output = {**layers[-1], "aux_outputs": layers[:-1]}
        if not self.training:
            output["reference_points"] = decoded.boxes[-2, ..., :2].unflatten(0, (b, t))
        return output

    def backbone_maps(self, frames: Tensor) -> list[Tensor]:
        """frames float (B,T,3,H,W), normalised -> raw maps (B*T,C,h,w) at strides 4, 8, 16 and 32."""
        body, images = self.backbone[0].body, frames.flatten(0, 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            if body.temporal or whole(images):
                return list(body(images, clip_frames=frames.shape[1]))
            # What lies between the layers of one image fits the caches; of a whole clip it is most of the memory.
            return _image_by_image(body, images)

    def project(self, maps: list[Tensor]) -> list[Tensor]:
        """Backbone maps at strides 4 to 32 -> projected maps (N,C,h,w) at strides 8 to 64 (the last from stride 32)."""
        return [project(item) for project, item in zip(self.input_proj, (*maps[1:], maps[3]), strict=True)]

    def fuse(self, maps: Tensor, text: TextFeatures) -> Tensor:
        """Multiply maps (B,T,C,h,w) with what their pixels find in the words."""
        t, h, w = maps.shape[1], *maps.shape[3:]
        pixels = maps.permute(0, 1, 3, 4, 2).flatten(1, 3)
        places = sine_positions_1d(text.word_mask, self.hidden)
        pixels = self.fusion_module(pixels, text.words, places, text.word_mask)
        return pixels.unflatten(1, (t, h, w)).permute(0, 1, 4, 2, 3)

    def object_queries(self, sentence: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Content (N,Q,C) of the queries, and their anchor logits (Q,4) or positions (Q,C) (3.6)."""
        n = len(sentence) * frames
        if not self.use_dab:
            content = sentence.repeat_interleave(frames, 0)[:, None].expand(-1, self.queries, -1)
            return content, self.query_embed.weight
        content, anchors = self.tgt_embed.weight, self.refpoint_embed.weight
        if self.num_patterns:
            content = (self.patterns_embed.weight[:, None] + content).flatten(0, 1)
            anchors = anchors.repeat(self.num_patterns, 1)
        return content.expand(n, -1, -1), anchors

    def _of_decoder(self, maps: QueryMaps, decoded: Decoded, text: TextFeatures) -> tuple:
        """What the pixel decoder works on (3.8)."""
        inputs = [maps.stride4, *decoded.memory[:3]]
        places = sine_positions_1d(text.word_mask, self.hidden)
        return inputs, maps.masks[:4], maps.positions[:4], text.words, places, text.word_mask, maps.finest

    def _answer_chosen(self, maps: QueryMaps, decoded: Decoded, text: TextFeatures, sizes: Tensor) -> dict[str, Tensor]:
        logits = self.class_embed[-1](decoded.states[-1]).float().unflatten(0, maps.projected[0].shape[:2])
        chosen, scores = select_queries(logits)
        of_frame = torch.arange(len(sizes), device=chosen.device), chosen.repeat_interleave(logits.shape[1])
        given = [self.controller(decoded.states[-1][of_frame])[:, None], sizes]
        given += [decoded.boxes[-1][of_frame][:, None]] if self.coordinates else []

        def masks_of(pyramid: Tensor, parameters: Tensor, sizes: Tensor, boxes: Tensor | None = None) -> Tensor:
            boxes = None if boxes is None else boxes[None]
            shape, last = (self.mask_channels, self.mask_layers), self.pixel_decoder.mask_features
            return layer_masks(pyramid, parameters[None], boxes, sizes, *shape, last)[0]

        masks = self.pixel_decoder.pyramid(*self._of_decoder(maps, decoded, text), masks_of, given)
        masks = masks[:, 0].unflatten(0, logits.shape[:2])
        return {"pred_logits": logits, "scores": scores, "chosen": chosen, "pred_masks": masks}

    def _predict(self, decoded: Decoded, features: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        """Logits, boxes and masks (N,Q,...) of every decoder layer (3.7, 3.9)."""
        starts = [decoded.initial, *decoded.boxes]
        masks = layer_masks(
            features,
            self.controller(decoded.states),
            decoded.boxes if self.coordinates else None,
            sizes,
            self.mask_channels,
            self.mask_layers,
        )
        return [
            {
                "pred_logits": self.class_embed[index](decoded.states[index]).float(),
                "pred_boxes": refine(self.bbox_embed[index](decoded.states[index]), starts[index]),
                "pred_masks": mask,
            }
            for index, mask in enumerate(masks)
        ]


def select_queries(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Which query answers each of B windows: logits (B,T,Q,K) -> its index (B,), and the mean of each query's
    probability over the frames, float32 (B,Q)."""
    scores = logits.float().sigmoid().mean(1).amax(-1)
    return scores.argmax(1), scores


def _image_by_image(body: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps of a backbone, the channels last in memory."""
    maps: list[Tensor] = []
    for index, image in enumerate(images.split(1)):
        found = body(image)
        if not maps:
            layout = {"dtype": found[0].dtype, "memory_format": torch.channels_last}
            maps = [torch.empty((len(images), *item.shape[1:]), **layout) for item in found]
        for item, of_all in zip(found, maps, strict=True):
            of_all[index] = item[0]
    return maps


def _projections(channels: tuple[int, int, int, int], hidden: int) -> nn.ModuleList:
    """1x1 convolutions for strides 8, 16 and 32 and a strided 3x3 one for stride 64, each with group norm."""
    convolutions = [nn.Conv2d(width, hidden, 1) for width in channels[1:]]
    convolutions.append(nn.Conv2d(channels[-1], hidden, 3, stride=2, padding=1))
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return nn.ModuleList(nn.Sequential(convolution, nn.GroupNorm(32, hidden)) for convolution in convolutions)
