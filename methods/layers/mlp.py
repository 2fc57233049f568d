"""Small feed-forward parts."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them: (...,inputs) -> (...,outputs)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        return self.layers[-1](x)


class FeatureResizer(nn.Module):
    """Linear, layer norm, dropout: (...,inputs) -> (...,outputs)."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)
        self.layer_norm = nn.LayerNorm(outputs, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer_norm(self.fc(x)))


def xavier_matrices(module: nn.Module) -> None:
    """Xavier-uniform values for every parameter of `module` with two axes or more."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
