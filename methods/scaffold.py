"""`new-method NAME`: a working adapter to start from, with its test."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path

from fewref.episodes.errors import InputError, write_atomic

ADAPTER = '''"""{name}: which colours does the object have in the support, and where are they in the query?"""

from __future__ import annotations

import numpy as np

from fewref.episodes.types import Prediction, Query, SupportSet
from fewref.methods.base import Method, MethodInfo

LEVELS = 8  # shades per colour channel


def colours(frames: np.ndarray) -> np.ndarray:
    """Colour bin of every pixel: uint8 (T,3,H,W) in, int (T,H,W) in 0..LEVELS**3-1 out."""
    red, green, blue = np.moveaxis(frames.astype(np.int64) * LEVELS // 256, 1, 0)
    return (red * LEVELS + green) * LEVELS + blue


class {cls}(Method):
    """Colour histograms of object and background; a pixel goes to the likelier of the two."""

    info = MethodInfo(name="{name}", summary="nearest colour histogram of the support", uses_text=False)

    def adapt(self, support: SupportSet) -> None:
        """Count the colours inside and outside of the support masks. Start afresh: nothing of an earlier call stays."""
        inside = np.zeros(LEVELS**3)
        outside = np.zeros(LEVELS**3)
        for shot in support.shots:  # shot.frames uint8 (T,3,H,W), shot.masks bool (T,H,W), shot.expression.text
            bins = colours(shot.frames)
            inside += np.bincount(bins[shot.masks], minlength=LEVELS**3)
            outside += np.bincount(bins[~shot.masks], minlength=LEVELS**3)
        # Shares of the two areas, so that a small object does not lose to a large background.
        inside /= max(inside.sum(), 1)
        outside /= max(outside.sum(), 1)
        self.is_object = inside > outside

    def predict(self, query: Query) -> Prediction:
        """Masks bool (T,H,W) at the size of query.frames, uint8 (T,3,H,W); query.text is the sentence."""
        masks = self.is_object[colours(query.frames)]
        return Prediction(query.id, masks, confidence=0.5)
'''

TEST = '''"""Tests of {name}: the contract of every method, and that it finds what it should."""

import numpy as np

from fewref.episodes.types import Clip, Expression, Query, Shot, SupportSet
from fewref.methods.check import check_method
from {name} import {cls}


def test_contract():
    failed = [check for check in check_method({cls}) if not check.passed]
    assert not failed, failed


def test_finds_the_colour_of_the_support():
    frames = np.zeros((2, 3, 20, 30), dtype=np.uint8)
    masks = np.zeros((2, 20, 30), dtype=bool)
    masks[:, 5:10, 5:15] = True
    frames[:, 0][masks] = 250
    clip = Clip("test", "a", ("0", "1"))
    method = {cls}()
    method.adapt(SupportSet("dog", (Shot(clip, Expression("0", "red dog", ("1",), "dog"), frames, masks),)))
    answer = method.predict(Query("b:0", clip, "red dog", np.roll(frames, 7, axis=3)))
    assert np.array_equal(answer.masks, np.roll(masks, 7, axis=2))
'''


def new_method(name: str, folder: Path) -> list[Path]:
    """Write `<name>.py`, a working adapter, and `test_<name>.py` into `folder`; returns the two paths.

    Run it with `--method <name>:<Class>` from that folder. Raises InputError for a name that is no lower-case Python
    module name or that an installed module has, and where a file of that name exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise InputError(f"new-method {name!r}: the name must be a Python module name, like my_method")
    cls = class_name(name)
    texts = {Path(folder) / f"{name}.py": ADAPTER, Path(folder) / f"test_{name}.py": TEST}
    for path in texts:
        if path.exists():
            raise InputError(f"{path}: exists already; choose another name or folder")
    if importlib.util.find_spec(name) is not None:
        raise InputError(f"new-method {name!r}: an installed module has this name; choose another one")
    for path, text in texts.items():
        write_atomic(path, text.replace("{name}", name).replace("{cls}", cls))
    return list(texts)


def class_name(name: str) -> str:
    """`my_method` -> `MyMethod`."""
    return "".join(part.capitalize() for part in name.split("_"))
