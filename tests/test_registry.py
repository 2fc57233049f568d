"""Names, entry points and dotted paths lead to classes; everything else to one clear line."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from fewref.episodes.errors import InputError
from fewref.methods import registry
from fewref.methods.controls import Empty, Oracle
from fewref.methods.registry import METHODS, load_method, method_names

OUTSIDE = """
from fewref.episodes.types import Prediction
from fewref.methods.base import Method, MethodInfo
class Mine(Method):
    info = MethodInfo("mine", "of my own")
    def adapt(self, support): pass
    def predict(self, query): return None
class Half(Method):
    info = MethodInfo("half", "half of one")
    def adapt(self, support): pass
class Nameless(Mine):
    info = None
NOT_A_CLASS = 3
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module of a name of its own in the current folder, not on the import path."""
    name = f"outside_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    return name


def test_names():
    assert load_method("empty") is Empty
    assert load_method("oracle") is Oracle
    assert method_names()[: len(METHODS)] == tuple(METHODS)


def test_controls_are_marked_as_such():
    for name in ("empty", "random", "copy-support", "oracle"):
        assert load_method(name).info.name == name
        assert load_method(name).info.kind == "control"


def test_a_near_name_is_offered():
    with pytest.raises(InputError, match="'copy-suport' is unknown: did you mean 'copy-support'"):
        load_method("copy-suport")


def test_dotted_path_in_the_current_folder(outside):
    before = list(sys.path)
    assert load_method(f"{outside}:Mine").info.summary == "of my own"
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}:Mien", "has no 'Mien': did you mean 'Mine'"),
        ("{}:NOT_A_CLASS", "not a subclass"),
        ("{}:Half", "does not define predict"),
        ("{}:Nameless", "has no `info`"),
        ("no_such_module_here:Mine", "'no_such_module_here' cannot be imported .ModuleNotFoundError"),
        (":Mine", "cannot be imported"),
    ],
)
def test_faults_of_a_dotted_path(outside, name, message):
    with pytest.raises(InputError, match=message) as caught:
        load_method(name.format(outside))
    assert "\n" not in str(caught.value)


def test_a_module_that_raises_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "raises_at_import.py").write_text("raise ValueError('two\\nlines')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="ValueError: two lines"):
        load_method("raises_at_import:Mine")


def test_entry_points(outside, monkeypatch):
    entry = EntryPoint(name="outsider", value=f"{outside}:Mine", group=registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.ENTRY_POINTS else [])
    assert "outsider" in method_names()
    assert load_method("outsider").__name__ == "Mine"


def test_the_registry_is_lazy():
    code = "import sys, fewref.methods.registry as r; r.load_method('empty'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
