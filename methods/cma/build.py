"""CMA from a configuration file: "tiny" and "paper" are shipped, any other is a JSON file of the same fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewref.episodes.errors import InputError, near, read_json
from fewref.methods.cma.net import CMANet
from fewref.methods.layers.backbone import build_backbone
from fewref.methods.text import Tokenizer, build_text_encoder, load_tokenizer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = ("tiny", "paper")


@dataclass(frozen=True)
class CMAConfig:
    """backbone: name and options for `build_backbone`; text: `encoder` for `build_text_encoder`, `tokenizer` for
    `load_tokenizer` (a file beside the configuration, or what that function takes); network: arguments of `CMANet`;
    short_side: pixels that the short side of a frame has in the network; train: fields of `TrainOptions`;
    train_from: those that differ where training starts from a checkpoint."""

    path: Path
    backbone: Mapping[str, Any]
    text: Mapping[str, Any]
    network: Mapping[str, Any]
    short_side: int
    train: Mapping[str, Any]
    train_from: Mapping[str, Any]


def read_config(name: str) -> CMAConfig:
    """The shipped configuration of a name, or the one in a JSON file. Raises InputError for neither, and bad fields."""
    path = CONFIGS / f"cma_{name}.json" if name in SHIPPED else Path(name)
    if path.suffix != ".json":
        raise InputError(f"--config {name!r} is unknown: {near(name, SHIPPED)} (or give a .json file)")
    values, fields = read_json(path), [field for field in CMAConfig.__dataclass_fields__ if field != "path"]
    if not isinstance(values, dict) or sorted(values) != sorted(fields):
        raise InputError(f"{path}: a configuration of CMA has exactly the fields {', '.join(fields)}")
    return CMAConfig(path=path, **values)


def build_network(config: CMAConfig, variant: str = "cma") -> CMANet:
    """A network of one variant ("cma", "self", "base") with fresh weights from torch's global generator.

    Raises InputError, naming the configuration, for options that a part does not have.
    """
    try:
        backbone = build_backbone(**config.backbone)
        text_encoder = build_text_encoder(config.text["encoder"])
        return CMANet(backbone=backbone, text_encoder=text_encoder, variant=variant, **config.network)
    except (TypeError, KeyError) as error:
        raise InputError(f"{config.path}: does not describe a CMA network ({error}); compare methods/configs") from None


def build_tokenizer(config: CMAConfig) -> Tokenizer:
    """The tokenizer of a configuration. Raises InputError where it is not at hand."""
    source = str(config.text.get("tokenizer", ""))
    beside = config.path.parent / source
    return load_tokenizer(beside if source and beside.exists() else source)
