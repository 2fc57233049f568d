"""A tiny trainable method with everything that an adaptation could leave behind, and episodes for it."""

from __future__ import annotations

import dataclasses
import hashlib
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fewref.episodes.types import Prediction, SupportSet
from fewref.methods.base import MethodInfo, Trainable
from fewref.methods.check import make_case


class ToyNet(nn.Module):
    """Convolutions with batch norm, dropout, a frozen embedding, a tied weight and a layer without use."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.text = nn.Embedding(7, 8)
        self.trunk = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.again = self.trunk[0]
        self.drop = nn.Dropout(0.5)
        self.controller = nn.Conv2d(8, 1, 1)
        self.unused = nn.Linear(2, 2)
        self.text.requires_grad_(False)

    def maps(self, frames):
        return self.backbone(torch.tensor(frames).float() / 255)

    def forward(self, frames, text, prior):
        word = self.text(torch.tensor(sum(map(ord, text)) % 7))[:, None, None]
        logits = self.controller(self.drop(self.trunk(self.maps(frames) + word + prior)))
        return F.interpolate(logits, frames.shape[-2:], mode="bilinear")[:, 0]


class Toy(Trainable):
    """Looks at the support through its mean colour; its loss draws from every global generator."""

    info = MethodInfo("toy", "a few convolutions")
    roles = {"backbone": ("backbone.",), "text": ("text.",), "head": ("controller.",)}
    adapt_defaults: dict = {}
    fails: dict = {}

    def __init__(self, **options):
        super().__init__(**options)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            self.network = ToyNet().eval()
        self.seen, self.calls, self.prior = [], 0, None

    def adapt(self, support):
        with torch.inference_mode():
            self.prior = self.encode(support.shots)

    def forget(self):
        self.prior, self.calls = None, 0

    def encode(self, shots):
        return torch.stack([self.network.maps(shot.frames).mean((0, 2, 3)) for shot in shots]).mean(0)[:, None, None]

    def probabilities(self, query):
        with torch.inference_mode():
            prob = self.network(query.frames, query.text, self.prior).sigmoid()
        return prob, 0.9

    def predict(self, query):
        prob, confidence = self.probabilities(query)
        return Prediction(query.id, (prob > prob.median()).numpy(), confidence)

    def features(self, frames):
        return self.network.maps(frames)

    def loss(self, target, memory):
        self.calls += 1
        if self.calls in self.fails:
            raise self.fails[self.calls]
        self.seen.append(target)
        logits = self.network(target.frames, target.expression.text, self.encode(memory))
        jitter = 1 + 0.01 * (torch.rand(()) + random.random() + np.random.random())
        return jitter * F.binary_cross_entropy_with_logits(logits, torch.tensor(target.masks).float())


def support_of(*numbers: int, frames: int = 4) -> SupportSet:
    shots = tuple(make_case(number, "dog", (24, 32), frames).support.shots[0] for number in numbers)
    return SupportSet("dog", shots)


def query_of(number: int):
    return make_case(number, "dog", (24, 32), 6).query


def blind(support: SupportSet) -> SupportSet:
    shots = tuple(dataclasses.replace(shot, masks=np.zeros_like(shot.masks)) for shot in support.shots)
    return dataclasses.replace(support, shots=shots)


def state(method) -> list:
    """All that an episode may not change, bit for bit: values, modes, flags, gradients, identities."""
    network = method.network
    found: list = [id(network)]
    for name, module in network.named_modules():
        found.append((name, id(module), module.training))
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    bits = hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
                    found.append((key, id(tensor), bits, tensor.requires_grad, id(tensor.grad)))
    return found


def generators() -> tuple:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
