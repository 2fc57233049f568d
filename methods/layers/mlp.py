"""Small feed-forward parts."""

from __future__ import annotations

from torch import Tensor, nn

from fewref.kernels.linear import linear
from fewref.methods.layers.piecewise import in_chunks


class Linear(nn.Linear):
    """As its base, computed by `fewref.kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class MLP(nn.Module):
    """Linear layers with ReLU between them: (...,inputs) -> (...,outputs)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        return self.layers[-1](x)


class FeatureResizer(nn.Module):
    """Linear, layer norm, dropout: (...,inputs) -> (...,outputs)."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.fc = Linear(inputs, outputs)
        self.layer_norm = nn.LayerNorm(outputs, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer_norm(self.fc(x)))


def feed_forward(x: Tensor, widen: nn.Module, narrow: nn.Module, dropout: nn.Module) -> Tensor:
    """(B,N,C) -> (B,N,C): a wide layer, ReLU, dropout and a narrow layer."""
    rows = x.flatten(0, 1)[None]
    return in_chunks(lambda part: narrow(dropout(widen(part).relu_())), rows).view(x.shape)


def xavier_matrices(module: nn.Module) -> None:
    """Xavier-uniform values for every parameter of `module` with two axes or more."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
