"""Weights that follow from names: the rule by which the golden cases fill every module.

A tensor's values come from NumPy's legacy generator, seeded with the CRC-32 of the tensor's name, so that two programs
which agree on names and shapes hold equal weights. Integer tensors are left as built; of tied tensors the first name
in the state dict counts.
"""

from __future__ import annotations

import functools
import math
import zlib

import numpy as np
import torch


@functools.cache
def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values of one tensor: matrices of unit gain, scales around 1, biases and means around 0."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    kind = name.split(".")[-1]
    if kind == "running_var":
        noise = 1 + 0.5 * np.abs(noise)
    elif kind == "running_mean":
        noise = 0.1 * noise
    elif len(shape) >= 2:
        noise = noise / math.sqrt(math.prod(shape[1:]))
    elif kind.endswith("bias"):
        noise = 0.1 * noise
    else:
        noise = 1 + 0.1 * noise
    return np.asarray(noise, dtype=np.float32)


@torch.no_grad()
def fill_by_name(module: torch.nn.Module) -> torch.nn.Module:
    """Fill every floating tensor of the module's state dict by its name; returns the module."""
    filled = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.data_ptr() not in filled:
            filled.add(tensor.data_ptr())
            tensor.copy_(torch.from_numpy(value(name, tuple(tensor.shape))))
    return module
