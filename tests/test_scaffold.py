"""The generated adapter works, its generated test passes, and nothing is overwritten."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fewref.episodes.errors import InputError
from fewref.methods.scaffold import new_method


def test_the_generated_test_passes(tmp_path):
    paths = new_method("my_colours", tmp_path)
    assert [path.name for path in paths] == ["my_colours.py", "test_my_colours.py"]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(paths[1])]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_it_is_found_by_its_dotted_path(tmp_path, monkeypatch):
    from fewref.methods.check import check_method
    from fewref.methods.registry import load_method

    new_method("found_by_path", tmp_path)
    monkeypatch.chdir(tmp_path)
    cls = load_method("found_by_path:FoundByPath")
    assert cls.info.name == "found_by_path"
    assert all(check.passed for check in check_method(cls))


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "test_mine.py").write_text("precious")
    with pytest.raises(InputError, match="test_mine.py: exists already"):
        new_method("mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]
    assert (tmp_path / "test_mine.py").read_text() == "precious"


@pytest.mark.parametrize("name", ["", "My", "my-method", "1st", "a/b", "class", "numpy", "random"])
def test_names_that_are_no_module(tmp_path, name):
    with pytest.raises(InputError, match="new-method"):
        new_method(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        new_method("mine_again", tmp_path / "file")
