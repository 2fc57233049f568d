"""`self-train`: pseudo-labels on the frames of the one query asked, seen without its masks (transductive).

Adaptation specification, 8. One thing differs from it, because a method's own loss takes masks and no pixel weights:
the pseudo-labels of the chosen frames go in as hard masks, frames that abstain are left out, and the pixel weights of
the specification (adaptive threshold times certainty) become one factor of each pseudo-labelled clip, their mean over
the surroundings of the labelled object. The teacher is not averaged over flips, and boxes follow from the hard masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewref.episodes.types import Expression, Query, Shot, SupportSet
from fewref.methods.adaptation.finetune import Descent, open_for_training, trained_parameters
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.adaptation.record import AdaptationRecord
from fewref.methods.adaptation.support import part, step_generator, vary
from fewref.methods.base import Trainable

DECAY = 0.99  # of the teacher, per step
SMALLEST = 0.0002  # share of a frame's pixels below which its label abstains
SUREST = 0.3  # confidence of the whole answer below which every frame abstains
BAND = 0.02  # of the diagonal, around the label
LOWEST, KEPT = 0.7, 0.8  # adaptive threshold: at least this probability; share of a class's pixels above it
AGREED, COLLAPSED = 0.98, 3.0  # mean IoU of successive labels that ends it; change of area that undoes a round


@dataclass(frozen=True)
class Label:
    """What the teacher says of the query: prob float32 (T,H,W), confidence in [0,1]."""

    prob: Tensor
    confidence: float

    @property
    def masks(self) -> Tensor:
        """bool (T,H,W), prob > 0.5."""
        return self.prob > 0.5


@dataclass(frozen=True)
class Pseudo:
    """A clip of chosen frames with the teacher's masks, and the factor of its loss in [0,1]."""

    shot: Shot
    weight: float


def self_train(
    method: Trainable,
    support: SupportSet,
    query: Query,
    options: AdaptOptions,
    task: Callable[[int], tuple[Shot, Sequence[Shot]]],
    seed: int,
) -> AdaptationRecord:
    """Leave the teacher's weights in the network, in train mode and with changed flags; the caller restores those.

    `options.steps` gradient steps in all, shared evenly by `options.rounds` labellings. A step learns from the task of
    the support and, ramped up over the first third, from a pseudo-labelled clip. Raises AdaptationError as `finetune`.
    """
    parameters = trained_parameters(method, options)
    teacher, descent, stop = Teacher(parameters), Descent(parameters, options), ""
    label = teach(method, teacher, support, query)
    for number in range(options.rounds):
        before = teacher.copy()
        clips = pseudo_clips(method, query, label, support, options.confident)
        last = math.ceil(options.steps * (number + 1) / options.rounds)
        open_for_training(method.network, parameters)
        with torch.enable_grad():
            for step in range(len(descent.losses), last):
                loss = method.loss(*task(step))
                ramp = min(1.0, 3 * step / options.steps)
                if clips and ramp > 0:
                    one = clips[step % len(clips)]
                    shot = vary(one.shot, step_generator(seed, step, one.shot)) if options.augment else one.shot
                    loss = loss + ramp * one.weight * method.loss(shot, support.shots)
                descent.step(loss)
                teacher.follow(parameters)
        fresh = teach(method, teacher, support, query)
        if collapsed(label.masks, fresh.masks):
            teacher, stop = before, f"round {number + 1}: the labelled area changed threefold; that round is undone"
        elif mean_iou(label.masks, fresh.masks) > AGREED:
            stop = f"round {number + 1}: the labels agree"
        label = fresh
        if stop:
            break
    teacher.write(parameters)
    return descent.record(stop)


class Teacher:
    """A running average of the trained weights. No other tensor changes meanwhile: the network is in eval mode."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in parameters.items()}

    def copy(self) -> Teacher:
        """The same average on its own."""
        return Teacher(self.weights)

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Move towards the student by 1 - `DECAY`."""
        for name, weight in self.weights.items():
            weight.lerp_(parameters[name].detach(), 1 - DECAY)

    @torch.no_grad()
    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy the average into the network's parameters."""
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)

    @contextmanager
    def in_place(self, network: nn.Module) -> Iterator[None]:
        """Inside, the network has the teacher's weights and is in eval mode."""
        parameters = dict(network.named_parameters())
        student = Teacher({name: parameters[name] for name in self.weights})
        self.write(parameters)
        network.eval()
        try:
            yield
        finally:
            student.write(parameters)


def teach(method: Trainable, teacher: Teacher, support: SupportSet, query: Query) -> Label:
    """The teacher's answer to the query as it is, under the support encoded with the teacher's weights."""
    with teacher.in_place(method.network), torch.no_grad():
        method.adapt(support)
        prob, confidence = method.probabilities(query)
    return Label(prob.detach().float(), float(confidence))


def pseudo_clips(method: Trainable, query: Query, label: Label, support: SupportSet, confident: float) -> list[Pseudo]:
    """The chosen frames as clips, none longer than the method's window or, where it looks at the support, than the
    shortest shot; empty where every frame abstains."""
    chosen = pick_frames(label, confident)
    longest = method.window
    if method.info.uses_support:
        longest = min(longest, *(len(shot.frames) for shot in support.shots))
    expression = Expression("pseudo", query.text, (), support.category)
    masks = label.masks.cpu().numpy()
    whole = Shot(query.clip, expression, query.frames, masks)
    weights, near = pixel_weights(label.prob), band(label.masks)
    clips = []
    for start in range(0, len(chosen), longest):
        places = chosen[start : start + longest]
        inside = weights[places][near[places]]
        clips.append(Pseudo(part(whole, places), float(inside.double().mean())))
    return clips


def pixel_uncertainty(prob: Tensor) -> Tensor:
    """Entropy of a probability in bits, the same for p and 1 - p: float of any shape, in [0,1]."""
    p = prob.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log()) / math.log(2)


def band(masks: Tensor) -> Tensor:
    """Masks bool (T,H,W) widened by 2 % of the diagonal (at least a pixel) to every side."""
    radius = max(1, round(BAND * math.hypot(*masks.shape[-2:])))
    return F.max_pool2d(masks[:, None].float(), 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0


def frame_uncertainty(prob: Tensor) -> Tensor:
    """Mean uncertainty of each frame's pixels in the band around its label: float64 (T,); NaN without a label."""
    near = band(prob > 0.5).double()
    return (near * pixel_uncertainty(prob.double())).sum((1, 2)) / near.sum((1, 2))


def pick_frames(label: Label, confident: float) -> list[int]:
    """The surest ceil(`confident` * T) frames in the order of time, ties to the earlier; those that abstain (hardly a
    pixel labelled, or an answer that is not sure of itself) are never among them."""
    if label.confidence < SUREST:
        return []
    areas = label.masks.sum((1, 2)) / label.masks[0].numel()
    doubt = frame_uncertainty(label.prob)
    shown = [time for time in range(len(areas)) if areas[time] >= SMALLEST and areas[time] > 0]
    wanted = math.ceil(confident * len(areas))
    return sorted(sorted(shown, key=lambda time: (float(doubt[time]), time))[:wanted])


def pixel_weights(prob: Tensor) -> Tensor:
    """Certainty of the pixels above the adaptive threshold of their class and frame, 0 for the others: (T,H,W).

    The threshold lets the surest 80 % of a class's pixels in a frame through, and never less than 0.7.
    """
    sure, masks = torch.maximum(prob, 1 - prob), prob > 0.5
    weights = torch.zeros_like(prob)
    for frame, mask, weight, whole in zip(sure, masks, weights, prob, strict=True):
        for members in (mask, ~mask):
            if members.any():
                level = max(LOWEST, float(np.quantile(frame[members].double().cpu().numpy(), 1 - KEPT)))
                passed = members & (frame.double() >= level)
                weight[passed] = 1 - pixel_uncertainty(whole[passed])
    return weights


def mean_iou(one: Tensor, other: Tensor) -> float:
    """Mean over the frames of the IoU of masks bool (T,H,W); 1 where both are empty."""
    both, either = (one & other).sum((1, 2)), (one | other).sum((1, 2))
    return float(torch.where(either > 0, both / either.clamp(min=1), 1.0).double().mean())


def collapsed(before: Tensor, after: Tensor) -> bool:
    """Whether the labelled area grew or shrank by more than a factor of 3."""
    areas = sorted((max(1, int(before.sum())), max(1, int(after.sum()))))
    return areas[1] > COLLAPSED * areas[0]
