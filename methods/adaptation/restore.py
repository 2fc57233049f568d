"""An episode leaves no trace: the network's state comes back bit for bit, and so do the global generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


class Keeper:
    """The state of a network at one moment: parameters, buffers, gradients, train/eval modes and requires_grad.

    As a context manager it restores all of it at the end, also after an exception. Tensors come back as the objects
    that they were, with the values that they had; hidden copies (1x the network) are freed with the keeper.
    """

    def __init__(self, network: nn.Module) -> None:
        copies: dict[int, torch.Tensor] = {}
        self._tensors, self._modes = [], [(module, module.training) for module in network.modules()]
        for module, _ in self._modes:
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        copy = copies.setdefault(id(tensor), tensor.detach().clone())
                        self._tensors.append((store, name, tensor, copy))
        self._flags = [(weight, weight.requires_grad, weight.grad) for weight in network.parameters()]

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Bring back everything; may be called again."""
        with torch.no_grad():
            for store, name, tensor, copy in self._tensors:
                store[name] = tensor
                tensor.copy_(copy)
        self.restore_flags()

    def restore_flags(self) -> None:
        """Bring back modes, requires_grad and gradients, and leave the values as they are now."""
        for weight, needed, gradient in self._flags:
            weight.requires_grad_(needed)
            weight.grad = gradient
        for module, training in self._modes:
            module.training = training


def seed_generators(key: str) -> None:
    """Seed the global generators of Python, NumPy and PyTorch by the SHA-256 of a string."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def own_generators(key: str, device: str) -> Iterator[None]:
    """Inside, the global generators are seeded by `key`, for methods that draw from them; afterwards they go on as if
    nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    place = torch.device(device)
    devices = [torch.cuda.current_device() if place.index is None else place.index] if place.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            seed_generators(key)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
