"""TF2 against golden numbers of the authors' code: every case of cases.json, at the tolerance stated there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity_tf2_network
import parity_tf2_parts
import pytest
from golden_case import golden_folder, load_cases

GOLDEN = golden_folder("tf2")
CHECKS = {**parity_tf2_parts.CHECKS, **parity_tf2_network.CHECKS}


@pytest.mark.parametrize("case", load_cases(GOLDEN), ids=lambda case: Path(case["file"]).stem)
def test_case(case: dict) -> None:
    stem = Path(case["file"]).stem
    names = [name for name in CHECKS if stem.startswith(name)]
    assert names, f"{case['file']} has no check"
    with np.load(GOLDEN / case["file"]) as arrays:
        CHECKS[max(names, key=len)](case, dict(arrays), GOLDEN)
