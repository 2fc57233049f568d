"""What a command is given: the built-in data are written once, whoever asks for them first."""

from __future__ import annotations

import pytest

from fewref.benchmark import inputs
from fewref.episodes.errors import InputError
from fewref.episodes.synthetic import write_synthetic


def test_another_process_may_write_the_built_in_data_first(tmp_path, monkeypatch):
    def beaten(root):
        write_synthetic(root, videos_per_category=2, layouts=("youtube",), size=(64, 64), frames=4, workers=1)
        write_synthetic(root)

    monkeypatch.setattr(inputs, "write_synthetic", beaten)
    assert len(inputs.open_dataset("builtin", tmp_path / "data").videos) == 96


def test_a_place_that_cannot_be_written_stays_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        inputs.open_dataset("builtin", tmp_path / "file" / "data")
