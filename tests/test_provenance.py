"""The header says what defines a run, and is made anywhere."""

from __future__ import annotations

import hashlib
import json
import subprocess

import pytest

import fewref
from fewref.benchmark import provenance
from fewref.benchmark.protocol import PROTOCOLS, get_protocol
from fewref.benchmark.scoring import get_scoring
from fewref.episodes.errors import InputError
from fewref.kernels.dispatch import report
from fewref.methods.controls import Oracle, Random


def made(small, method=None, **options) -> dict:
    options = {"method_name": "random", "manifest": small.manifest, "scoring": ["davis"], **options}
    return provenance.header(method=method or Random(), **options)


def test_what_defines_a_run(small, tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"abc")
    header = made(small, Random(seed=3, weights=weights, precision="bf16", window=5), extras={"trained_on": 2})
    expected = {
        "version": fewref.__version__,
        "method": "random",
        "class": "fewref.methods.controls:Random",
        "seed": 3,
        "window": 5,
        "precision": "bf16",
        "device": "cpu",
        "parameters": 0,
        "checkpoint_sha256": hashlib.sha256(b"abc").hexdigest(),
        "dataset": "mini-ref-youtube-vos",
        "group": "1",
        "metadata_hash": small.index.metadata_hash(),
        "manifest_hash": small.manifest.hash,
        "scoring": ["davis"],
        "extras": {"trained_on": 2},
    }
    assert {name: header["defines"][name] for name in expected} == expected
    assert header["defines"]["episodes"]["supports"] == 2
    assert json.loads(json.dumps(header)) == header


def test_the_environment(small):
    found = made(small)["environment"]
    assert found["libraries"]["numpy"] == __import__("numpy").__version__
    assert found["kernels"] == report("cpu")
    assert "ru_maxrss" in found["peak_memory"]
    assert found["threads"] >= 1
    assert found["command"]


def test_run_ids_depend_on_what_defines_the_run_alone(small, monkeypatch):
    first = made(small)["run"]
    monkeypatch.setattr("sys.argv", ["something", "else"])
    assert made(small)["run"] == first
    others = [Random(seed=1), Random(window=1), Random(precision="bf16"), Oracle()]
    assert len({first, made(small, text="empty")["run"], *(made(small, other)["run"] for other in others)}) == 6


def test_git(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert provenance.git_state(tmp_path) is None
    git("init", "-q")
    assert provenance.git_state(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    sha = git("rev-parse", "HEAD").strip()
    assert provenance.git_state(tmp_path) == {"sha": sha, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert provenance.git_state(tmp_path) == {"sha": sha, "dirty": True}
    (tmp_path / "inside").mkdir()
    assert provenance.git_state(tmp_path / "inside") is None


def test_no_git_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path) is None


def test_missing_weights(small, tmp_path):
    with pytest.raises(InputError, match="no-such-file"):
        made(small, Random(weights=tmp_path / "no-such-file"))


def test_protocols():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert get_protocol(name) is protocol
        assert get_scoring(protocol.scoring).name == protocol.scoring
    assert get_protocol("group").episodes.supports == 5
    assert get_protocol("cma-paper").episodes.assignment == "last_expression"
    with pytest.raises(InputError, match="--protocol 'grup' is unknown: did you mean 'group'"):
        get_protocol("grup")
