"""The command line: every kind of bad input gives one clear line and exit code 2, and leaves nothing half-written."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewref.benchmark.store import read_header, read_rows
from fewref.episodes.errors import InputError
from fewref.methods import compiling, query_method
from fewref.methods.cma.adapter import CMA
from fewref.methods.network_config import read_config
from fewref.run_benchmark import build_parser, main

ROOT = Path(__file__).resolve().parents[1]
DATASET = "mini-ref-youtube-vos"


def data(small) -> list[str]:
    return ["--dataset", DATASET, "--data-root", str(small.root), "--group", "1"]


def asked(small, *more: str) -> list[str]:
    """A run over the small data; --method and --out are the caller's."""
    return ["run", *data(small), "--manifest", str(small.path), "--workers", "0", *more]


def refused(capsys, arguments: list[str]) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:], lines
    assert "Traceback" not in "".join(lines)
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rnu"], ("rnu", "run")),
        (["run", "--method", "coppy-support"], ("coppy-support", "copy-support")),
        (["run", "--method", "empty", "--grup", "1"], ("--grup", "--group")),
        (["run"], ("--method",)),
        (["run", "--method", "empty", "--dataset", "mini-davos"], ("mini-davos", "mini-davis")),
        (["run", "--method", "empty", "--dataset", "mini-davis"], ("--data-root", "mini-davis")),
        (["run", "--method", "empty", "--protocol", "gruop"], ("gruop", "group")),
        (["run", "--method", "empty", "--device", "cdua"], ("cdua", "cuda")),
        (["run", "--method", "empty", "--precision", "fp23"], ("fp23", "fp32")),
        (["run", "--method", "empty", "--shard", "two"], ("--shard", "I/N")),
        (["run", "--method", "no.such:Thing"], ("no.such",)),
        (["run", "--method", "empty", "--adapt", "finetune"], ("--adapt finetune", "empty", "none alone")),
        (["run", "--method", "cma", "--adapt", "finetun"], ("finetun", "'finetune'")),
        (["run", "--method", "cma", "--adapt", "head", "--adapt-steps", "0"], ("--adapt-steps", "'0'", "1,5")),
        (["run", "--method", "cma", "--adapt", "head", "--adapt-option", "lrr=1"], ("lrr", "'lr'")),
        (["run", "--method", "cma", "--adapt", "head", "--support", "none"], ("--adapt head", "--support none")),
        (["run", "--method", "cma", "--shots", "1,two"], ("--shots", "1,two")),
        (["run", "--method", "empty", "--batch", "0"], ("--batch 0",)),
        (["run", "--method", "empty", "--kernels", "nunba"], ("--kernels 'nunba'", "numba")),
        (["run", "--method", "cma", "--compile", "--adapt", "head"], ("--compile", "--adapt head")),
        (["run", "--methods", "cma,coppy-support"], ("coppy-support", "copy-support")),
        (["train", "--method", "oracle"], ("oracle", "trained")),
        (["train", "--option", "lrr=1"], ("lrr", "'lr'")),
        (["train", "--option", "lr:1"], ("--option lr:1", "NAME=VALUE")),
        (["train", "--meta", "mamll"], ("mamll", "maml")),
        (["train", "--inner-steps", "3"], ("--inner-steps", "--meta")),
        (["table", ".", "--curve", "shots"], ("holds no run",)),
        (["describe", "cmma"], ("cmma", "cma")),
        (["describe", "oracle", "--check", "--weights", "x"], ("oracle", "no weights")),
        (["table", "no-such-folder"], ("no-such-folder",)),
        (["episodes", "shwo", "x"], ("shwo", "show")),
        (["episodes", "show", "zzz"], ("zzz",)),
        (["episodes", "check", "nothing.json"], ("nothing.json",)),
        (["data", "check", "no-such-folder"], ("no-such-folder",)),
        (["new-method", "not a name"], ("not a name",)),
    ],
)
def test_wrong_words_are_named_with_the_mend(capsys, arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, arguments)
    assert all(part in message for part in parts), message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bad_values_of_a_run(capsys, small, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    cases = {
        ("--text", "wrong"): "--text",
        ("--support", "nobody"): "--support",
        ("--scoring", "davs"): "davis",
        ("--window", "0"): "--window 0",
        ("--draws", "0"): "--draws 0",
        ("--shots", "2"): "shots",
        ("--shard", "2/2"): "--shard 2/2",
    }
    for options, part in cases.items():
        assert part in refused(capsys, [*asked(small, "--method", "empty", *out), *options])
    assert not (tmp_path / "out").exists()


def test_manifest_of_other_data(capsys, small, tmp_path):
    out = ["--method", "empty", "--out", str(tmp_path / "out")]
    frozen = next((ROOT / "episodes/manifests").glob("builtin-1-group-*.json"))
    message = refused(capsys, ["run", *data(small), "--manifest", str(frozen), *out])
    assert "builtin" in message
    assert DATASET in message
    edited = json.loads(small.path.read_text())
    edited["episodes"] = edited["episodes"][:1]
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    message = refused(capsys, ["run", *data(small), "--manifest", str(tmp_path / "edited.json"), *out])
    assert "edited.json" in message
    assert "sha256" in message
    (tmp_path / "cut.json").write_text(small.path.read_text()[:99])
    message = refused(capsys, ["run", *data(small), "--manifest", str(tmp_path / "cut.json"), *out])
    assert "cut.json" in message
    assert "JSON" in message
    assert not (tmp_path / "out").exists()


def test_damaged_data(capsys, small, tmp_path):
    root = tmp_path / DATASET
    shutil.copytree(small.root, root)
    episode = small.manifest.episodes[0]
    image = root / "train/JPEGImages" / episode.queries[0].clip.video / "00005.jpg"
    image.write_bytes(image.read_bytes()[:200])
    run = ["--method", "empty", "--out", str(tmp_path / "out"), "--manifest", str(small.path), "--workers", "0"]
    message = refused(capsys, ["run", "--dataset", DATASET, "--data-root", str(root), "--group", "1", *run])
    assert str(image) in message
    meta = root / "train/meta.json"
    meta.write_text(meta.read_text()[:-20])
    message = refused(capsys, ["run", "--dataset", DATASET, "--data-root", str(root), "--group", "1", *run])
    assert str(meta) in message
    assert "JSON" in message
    assert main(["data", "check", str(root)]) == 1
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 1
    assert found[0].startswith(f"{meta}: not valid JSON")


class Trap:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "executed")


def test_bad_checkpoints(capsys, small, tmp_path):
    """A pickle that is no plain checkpoint, one of another architecture, a truncated one, a missing one."""
    run = ["--method", "cma", "--out", str(tmp_path / "out")]
    pickled, other, cut = tmp_path / "trap.pth", tmp_path / "other.pth", tmp_path / "cut.pth"
    pickled.write_bytes(pickle.dumps({"model": Trap(tmp_path / "trace")}))
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, other)
    torch.save({"model": CMA.build(read_config("cma", "tiny")).state_dict()}, tmp_path / "whole.pth")
    cut.write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    for path in (pickled, other, cut, tmp_path / "missing.pth"):
        assert str(path) in refused(capsys, asked(small, *run, "--weights", str(path)))
    assert not (tmp_path / "trace").exists()
    message = refused(capsys, asked(small, *run))
    assert "--weights" in message
    assert DATASET in message
    message = refused(capsys, asked(small, *run, "--weights", str(tmp_path / "whole.pth"), "--config", "tny"))
    assert "tny" in message
    assert "tiny" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="file permissions of POSIX")
def test_unwritable_places(capsys, small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    blocked = str(tmp_path / "file" / "below")
    assert blocked in refused(capsys, asked(small, "--method", "empty", "--out", blocked))
    assert blocked in refused(capsys, ["data", "synth", blocked])
    assert blocked in refused(capsys, ["new-method", "mine", "--out", blocked])
    assert blocked in refused(capsys, ["episodes", "build", *data(small), "--supports", "1", "--out", blocked])
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_run_and_what_is_made_of_it(capsys, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "oracle"):
        assert main(asked(small, "--method", name, "--out", "runs")) == 0
    assert main(asked(small, "--method", "copy-support", "--text", "empty", "--support", "none", "--out", "runs")) == 0
    assert len(read_rows(Path("runs/copy-support-text-empty-support-none/group-1"))) == 24
    assert main(["score", "runs/oracle", "--data-root", str(small.root), "--scoring", "mevis", "--out", "again"]) == 0
    (rescored,) = {header.parent for header in Path("again").rglob("header.json")}
    assert all(row.means("mevis") == (1.0, 1.0) for row in read_rows(rescored))
    assert main(["table", "runs", "--out", "tables"]) == 0
    text = Path("tables/leaderboard.md").read_text()
    assert "oracle (sees truth)" in text
    assert "Published numbers" in text
    assert str(tmp_path) not in text
    capsys.readouterr()
    assert main(["compare", "runs/oracle", "runs/empty"]) == 0
    assert "A: oracle" in capsys.readouterr().out
    assert main(["picture", "runs", "--data-root", str(small.root), "--out", "picture.png"]) == 0
    assert Image.open("picture.png").width > 500


def test_fast_ways_of_a_run_are_in_its_header(capsys, small, tmp_path):
    """What changes float rounding defines a run; a default leaves no word, so that older runs can be taken up."""
    plain = asked(small, "--method", "empty", "--device", "cpu", "--out", str(tmp_path))
    assert main([*plain, "--batch", "2", "--kernels", "pytorch"]) == 0
    folder = tmp_path / "empty/group-1"
    header = read_header(folder)
    assert header["defines"]["batch"] == 2
    assert header["defines"]["extras"] == {"protocol": "group", "kernels": "pytorch"}
    told = header["environment"]["kernels"]
    assert {told.pop("mask_scores"), *told.values()} == {"numpy", "pytorch"}
    assert set(told.values()) == {"pytorch"}
    assert "batch = 2, not None" in refused(capsys, [*plain, "--kernels", "pytorch"])
    assert "extras.kernels = 'pytorch', not None" in refused(capsys, [*plain, "--batch", "2"])
    shutil.rmtree(folder)
    assert main(plain) == 0
    defines = read_header(folder)["defines"]
    assert {"batch", "compile", "kernels"}.isdisjoint(defines)
    assert defines["extras"] == {"protocol": "group"}
    assert main([*plain, "--batch", "1"]) == 0


def test_forced_kernels_are_checked_before_anything_starts(capsys, small, tmp_path, monkeypatch):
    run = asked(small, "--method", "empty", "--device", "cpu", "--out", str(tmp_path / "out"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = refused(capsys, [*run, "--kernels", "triton"])
    assert message.startswith("error: --kernels 'triton': runs on a CUDA device")
    monkeypatch.setenv("FEWREF_KERNELS", "nunba")
    assert "error: FEWREF_KERNELS='nunba'" in refused(capsys, run)
    assert not (tmp_path / "out").exists()


def test_compiling(capsys, small, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(query_method, "compile_parts", compiled.append)
    run = asked(small, "--method", "cma", "--weights", "untrained", "--draws", "1", "--queries", "1")
    assert main([*run, "--compile", "--out", str(tmp_path / "one")]) == 0
    assert len(compiled) == 1
    assert read_header(tmp_path / "one/cma/group-1")["defines"]["compile"] is True
    monkeypatch.undo()

    def missing(device):
        raise InputError("--compile: cannot compile for cpu; install g++")

    monkeypatch.setattr(compiling, "check_compiler", missing)
    assert "install g++" in refused(capsys, [*run, "--compile", "--out", str(tmp_path / "two")])
    assert not (tmp_path / "two").exists()


def test_huge_pages_are_asked_for_before_pytorch_is_there(monkeypatch):
    code = "import sys, fewref.run_benchmark as r; r.build_parser(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
    name = "THP_MEM_ALLOC_ENABLE"
    for given, wanted in ((None, "1"), ("0", "0")):
        monkeypatch.setenv(name, given or "")
        if given is None:
            monkeypatch.delenv(name)
        assert main(["describe", "oracle"]) == 0
        assert os.environ[name] == wanted


def test_episodes_and_data(capsys, small, tmp_path):
    out = tmp_path / "manifests"
    assert main(["episodes", "build", *data(small), "--supports", "2", "--support-frames", "2", "--out", str(out)]) == 0
    (path,) = out.iterdir()
    assert json.loads(path.read_text())["sha256"] == small.manifest.hash
    assert main(["episodes", "check", str(path), "--data-root", str(small.root)]) == 0
    assert "0 leaks" in capsys.readouterr().out
    assert main(["episodes", "show", small.manifest.episodes[1].id, "--manifest", str(path)]) == 0
    assert small.manifest.episodes[1].category in capsys.readouterr().out
    assert (
        main(["data", "check", str(small.root), "--checksums", "write", "--checksum-file", str(tmp_path / "sums")]) == 0
    )
    verify = ["data", "check", str(small.root), "--checksums", "verify", "--checksum-file", str(tmp_path / "sums")]
    assert main(verify) == 0
    (tmp_path / "sums").write_text((tmp_path / "sums").read_text().replace("0", "1", 1))
    assert main(verify) == 1


def test_every_command_has_help():
    parser = build_parser()
    for words in (["--help"], ["run", "--help"], ["episodes", "build", "--help"], ["data", "synth", "--help"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(words)
        assert stop.value.code == 0


def test_the_script_is_the_command(tmp_path):
    """`python run_benchmark.py` from the checkout, whose folders must not hide distributions of their names."""
    run = subprocess.run(
        [sys.executable, "run_benchmark.py", "describe", "oracle"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "ground truth" in run.stdout
    run = subprocess.run(
        [sys.executable, str(ROOT / "run_benchmark.py"), "run", "--method", "x"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: method 'x' is unknown")
