"""What the golden parity tests share: reading the cases, and holding outputs against them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fewref.episodes.errors import read_json


def golden_folder(name: str) -> Path:
    """Folder of one set of golden numbers; FEWREF_GOLDEN_DIR, where set, replaces tests/golden."""
    return Path(os.environ.get("FEWREF_GOLDEN_DIR") or Path(__file__).parent / "golden") / name


def load_cases(folder: Path) -> list[dict]:
    """The list of cases in a folder's cases.json."""
    return read_json(folder / "cases.json")["cases"]


class Expect:
    """Compare outputs of one case by name; `finish` fails where an expected array was never compared."""

    def __init__(self, case: dict, arrays: Mapping[str, np.ndarray]) -> None:
        self.case, self.arrays = case, arrays
        told = case["arrays"]
        self.left = {name for name in arrays if name.startswith("out_") or told[name].get("role") == "output"}

    def __call__(self, name: str, actual: object) -> None:
        """name: with or without its prefix `out_`; shapes must be equal, values within its stated tolerance."""
        if isinstance(actual, torch.Tensor):
            actual = actual.detach().cpu().numpy()
        name = name if name in self.arrays else f"out_{name}"
        actual, wanted = np.asarray(actual), self.arrays[name]
        self.left.discard(name)
        label = f"{self.case['file']}: {name}"
        assert actual.shape == wanted.shape, f"{label} has shape {actual.shape}, not {wanted.shape}"
        tolerance = self.case["arrays"][name].get("tolerance") or self.case["tolerance"]
        if tolerance == "exact":
            np.testing.assert_array_equal(actual, wanted, err_msg=label)
        else:
            np.testing.assert_allclose(actual, wanted, tolerance["rtol"], tolerance["atol"], err_msg=label)

    def finish(self) -> None:
        assert not self.left, f"{self.case['file']}: never compared: {sorted(self.left)}"
