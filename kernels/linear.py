"""Fully connected layers, on a CPU through oneDNN where that is faster than the BLAS that PyTorch was built with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewref.kernels.dispatch import choose

WORTH = 2**21  # products of a layer below which the detour costs more than it gains


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """x (...,I) times weight (O,I) transposed, plus bias (O,): (...,O).

    The form "pytorch" sends float32 on a CPU to oneDNN as a 1x1 convolution over a channels-last view, without a copy:
    MKL, which `F.linear` takes, reaches less than half of that on AMD processors. Only without gradients, as the
    backward pass gains nothing. "reference" is `F.linear`.
    """
    worth = x.numel() * len(weight) >= WORTH and x.dtype == weight.dtype
    if not (worth and onednn_pays(x)) or choose("linear", x.device, x.dtype, backend) == "reference":
        return F.linear(x, weight, bias)
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1,I,1,rows), channels last
    y = torch.mkldnn_convolution(image, weight[:, :, None, None], bias, [0, 0], [1, 1], [1, 1], 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def onednn_pays(x: Tensor) -> bool:
    """Whether products with `x` are faster by the detour; what is compiled is left to the compiler."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
