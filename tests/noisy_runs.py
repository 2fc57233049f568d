"""A method whose answers show every dependence on order and split, and runs of it."""

from __future__ import annotations

import json

import numpy as np
import torch

from fewref.benchmark.runner import run
from fewref.benchmark.store import COSTS
from fewref.episodes.types import Prediction
from fewref.methods.base import Method, MethodInfo

QUERIES = 24


class Noisy(Method):
    """Random masks from the global generators, shifted by the support: shows every dependence on order and split."""

    info = MethodInfo("noisy", "random masks")
    calls: list[str]

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def adapt(self, support):
        self.calls.append("adapt")
        self.offset = float(torch.rand(())) + support.shots[0].masks.mean()

    def predict(self, query):
        self.calls.append(query.id)
        noise = np.random.random((len(query.frames), *query.frames.shape[2:])) + torch.rand(()).item() + self.offset
        return Prediction(query.id, noise > 1.5, confidence=0.25, input_masks=noise[:, ::2, ::2] > 1.5)


def start(small, out, method=None, **options):
    method = method or Noisy()
    options = {"method_name": method.info.name, "workers": 0, "progress": False, **options}
    return run(method=method, manifest=small.manifest, index=small.index, out=out, **options)


def content(folder, kind: str = "rows", without: tuple[str, ...] = COSTS) -> list[str]:
    """The lines of a file of the run folder, without the fields that time and memory change."""
    lines = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in line.items() if key not in without}) for line in lines]


def copy_cut(source, target, rows: bytes, predictions: bytes):
    target.mkdir()
    for name in ("header.json", "manifest.json"):
        (target / name).write_bytes((source / name).read_bytes())
    (target / "rows.jsonl").write_bytes(rows)
    (target / "predictions.jsonl").write_bytes(predictions)
