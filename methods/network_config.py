"""A method's network from a configuration file: "tiny" and "paper" are shipped, any other is a JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewref.episodes.errors import InputError, near, read_json
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.text import Tokenizer, build_text_encoder, load_tokenizer

CONFIGS = Path(__file__).resolve().parent / "configs"
SHIPPED = ("tiny", "paper")


@dataclass(frozen=True)
class NetworkConfig:
    """backbone: name and options for `build_backbone`; text: `encoder` for `build_text_encoder`, `tokenizer` for
    `load_tokenizer` (a file beside the configuration, or what that function takes); network: arguments of the method's
    network; short_side: pixels that the short side of a frame has in the network; train: fields of `TrainOptions`;
    train_from: those that differ where training starts from a checkpoint; adapt: strategy -> fields of
    `AdaptOptions`."""

    path: Path
    backbone: Mapping[str, Any]
    text: Mapping[str, Any]
    network: Mapping[str, Any]
    short_side: int
    train: Mapping[str, Any]
    train_from: Mapping[str, Any]
    adapt: Mapping[str, Mapping[str, Any]]


def read_config(method: str, name: str) -> NetworkConfig:
    """The configuration of that name which is shipped for a method, or the one in a JSON file.

    Raises InputError for neither, and for bad fields.
    """
    path = CONFIGS / f"{method}_{name}.json" if name in SHIPPED else Path(name)
    if path.suffix != ".json":
        raise InputError(f"--config {name!r} is unknown: {near(name, SHIPPED)} (or give a .json file)")
    values = read_json(path)
    fields = [field for field in NetworkConfig.__dataclass_fields__ if field != "path"]
    if not isinstance(values, dict) or sorted(values) != sorted(fields):
        raise InputError(f"{path}: a configuration of {method} has exactly the fields {', '.join(fields)}")
    return NetworkConfig(path=path, **values)


def build_network(config: NetworkConfig, network: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A network (a class as `QueryNet`) with fresh weights from torch's global generator.

    Raises InputError, naming the configuration, for options that a part does not have.
    """
    try:
        backbone = build_backbone(**config.backbone)
        text_encoder = build_text_encoder(config.text["encoder"])
        return network(backbone=backbone, text_encoder=text_encoder, **options, **config.network)
    except (TypeError, KeyError) as error:
        raise InputError(f"{config.path}: is not for this network ({error}); compare methods/configs") from None


def build_tokenizer(config: NetworkConfig) -> Tokenizer:
    """The tokenizer of a configuration. Raises InputError where it is not at hand."""
    source = str(config.text.get("tokenizer", ""))
    beside = config.path.parent / source
    return load_tokenizer(beside if source and beside.exists() else source)
