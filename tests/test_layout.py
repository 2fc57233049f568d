"""The shape of the project: imports go one way, nothing lands beside `fewref` in site-packages, files stay small."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewref

ROOT = Path(__file__).resolve().parents[1]
# What the files of a folder may import of ours beside their own folder. What a method sees of `episodes` are types,
# draws and transforms of pixels that it has: it has no way to the masks of a query.
ALLOWED = {
    "splits": ("episodes.errors",),
    "episodes": ("splits",),
    "kernels": (),
    "methods": ("kernels", "episodes.types", "episodes.errors", "episodes.draws", "episodes.transforms"),
    "benchmark": ("methods", "kernels", "episodes", "splits"),
}
WITHOUT_NETWORKS = ("episodes", "splits")
NETWORKS = ("torch", "torchvision", "timm", "transformers")
ONLY_IMPORTER = {"transformers": "methods/text.py", "learn2learn": "methods/adaptation/meta.py"}
LONGEST = 400  # lines
DATA = (".json", ".safetensors", ".csv")


def project_files() -> list[str]:
    """Files that git tracks, or without git all that are no product of an installation or a run; as posix paths."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=False)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else []
    if not any(names):
        made = re.compile(r"(^|/)(\.[^/]*|__pycache__|build|dist|runs|[^/]*\.egg-info)/")
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
        names = [name for name in names if not made.search(name)]
    return sorted(name for name in names if name and (ROOT / name).is_file())


def package_files(suffixes: tuple[str, ...] = (".py",)) -> list[str]:
    """Files that belong into the package: those in its folders, and the modules at the top."""
    names = [name for name in project_files() if name.endswith(suffixes)]
    return [name for name in names if name.split("/")[0] in ALLOWED or ("/" not in name and name.endswith(".py"))]


def method_folders() -> set[str]:
    """The folders of one method each."""
    return {path.parent.name for path in (ROOT / "methods").glob("*/__init__.py")} - {"adaptation", "layers"}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a source imports, anywhere in it; a leading dot marks a relative one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def fault_of(path: str, target: str, folders: set[str]) -> str:
    """What is wrong with the file `path` importing `target`; "" if nothing is."""
    own, (top, _, inner) = path.split("/")[0], target.partition(".")
    if not top or top in ALLOWED or top == "run_benchmark":
        return "our own modules are written fewref.<folder>.<module>"
    if own in WITHOUT_NETWORKS and top in NETWORKS:
        return f"{own} does without {top}"
    if ONLY_IMPORTER.get(top, path) != path:
        return f"only {ONLY_IMPORTER[top]} imports {top}"
    if top != "fewref" or own not in ALLOWED:
        return ""
    if inner.split(".")[0] not in (*ALLOWED, "run_benchmark"):
        return ""  # the package itself, for its version
    if not any(f"{inner}.".startswith(f"{allowed}.") for allowed in (own, *ALLOWED[own])):
        return f"{own} does not import {inner}"
    parts = inner.split(".")
    if own == "methods" == parts[0] and parts[1] in folders and not path.startswith(f"methods/{parts[1]}/"):
        return f"what others need of {parts[1]} belongs in methods/layers"
    return ""


def faults(path: str, source: str, folders: set[str]) -> list[str]:
    """Every import of a file against the rules."""
    found = [(line, fault_of(path, target, folders)) for line, target in imports(source)]
    return [f"{path}:{line}: {fault}" for line, fault in found if fault]


def test_imports_go_one_way():
    names, folders = package_files(), method_folders()
    assert {"run_benchmark.py", "splits/__init__.py", "kernels/affinity.py", "methods/cma/net.py"} <= set(names)
    assert "cma" in folders
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    assert "fewref.kernels.affinity.affinity" in [target for _, target in imports(sources["methods/cma/affinity.py"])]
    assert [fault for name, source in sources.items() for fault in faults(name, source, folders)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("episodes/new.py", "from fewref.methods.base import Method"),
        ("episodes/new.py", "import fewref.benchmark.metrics"),
        ("episodes/new.py", "from fewref.kernels import dispatch"),
        ("episodes/new.py", "def late():\n    import torch.nn.functional as F"),
        ("splits/new.py", "from torch import Tensor"),
        ("splits/new.py", "from fewref.episodes.readers import read_index"),
        ("splits/new.py", "from fewref import episodes"),
        ("kernels/new.py", "from fewref.episodes.types import Query"),
        ("methods/new.py", "from fewref.benchmark import store"),
        ("methods/new.py", "from fewref.episodes.readers import read_masks"),
        ("methods/new.py", "from fewref.episodes import load"),
        ("methods/new.py", "import importlib\nimportlib.import_module('fewref.benchmark.runner')"),
        ("methods/other/net.py", "from fewref.methods.cma.net import CMANet"),
        ("methods/other/net.py", "from fewref.methods import cma"),
        ("methods/layers/new.py", "from fewref.methods.cma.affinity import QKV"),
        ("methods/cma/new.py", "from transformers import AutoModel"),
        ("methods/cma/new.py", "import learn2learn"),
        ("methods/cma/new.py", "from .net import CMANet"),
        ("methods/cma/new.py", "from ..layers import boxes"),
        ("benchmark/new.py", "from fewref.run_benchmark import main"),
        ("benchmark/new.py", "from fewref import run_benchmark"),
        ("benchmark/new.py", "import kernels"),
        ("benchmark/new.py", "from episodes.types import Query"),
        ("run_benchmark.py", "from benchmark.runner import run"),
    ],
)
def test_a_planted_import_is_caught(path, source):
    assert len(faults(path, source, {"cma", "other"})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("episodes/new.py", "import numpy\nfrom fewref.splits import load_split\nfrom fewref.episodes import types"),
        ("splits/new.py", "from fewref.episodes.errors import InputError"),
        ("methods/cma/new.py", "import torch\nfrom fewref.methods.cma.net import CMANet\nfrom fewref.kernels import x"),
        ("methods/text.py", "from transformers import RobertaModel"),
        ("methods/adaptation/meta.py", "def late():\n    import learn2learn"),
        ("methods/new.py", "from fewref.episodes.types import Query\nfrom fewref.methods.layers.boxes import area"),
        (
            "benchmark/new.py",
            "import fewref\nfrom fewref import __version__\nfrom fewref.methods.cma.net import CMANet",
        ),
        ("run_benchmark.py", "from fewref.benchmark.runner import run\nfrom fewref.episodes.readers import read_index"),
    ],
)
def test_an_import_along_the_direction_passes(path, source):
    assert faults(path, source, {"cma", "other"}) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel as `pip install .` builds it, from a copy, so that the checkout stays as it is."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in project_files():
        if not name.startswith("tests/golden/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, out], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("fewref-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder that stands for site-packages after an installation of the wheel."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_everything_in_the_wheel_lies_under_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {re.sub(r"^fewref-[^/]*\.dist-info$", "info", name.split("/")[0]) for name in names} == {"fewref", "info"}
    assert not [name for name in names if name.startswith("fewref/tests/") or "__pycache__" in name]


def test_the_wheel_holds_all_code_and_data(wheel):
    wanted = package_files((".py", *DATA))
    assert {"splits/builtin.json", "run_benchmark.py", "methods/layers/boxes.py"} <= set(wanted)
    assert sorted({f"fewref/{name}" for name in wanted} - set(zipfile.ZipFile(wheel).namelist())) == []


def test_setup_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    folders = [name.rpartition("/")[0] for name in package_files() if name.endswith("__init__.py")]
    assert setup["options"]["packages"].split() == sorted(
        f"fewref/{folder}".rstrip("/").replace("/", ".") for folder in folders
    )
    without = {name.rpartition("/")[0] for name in package_files()} - set(folders)
    assert not without, f"folders with modules but without __init__.py: {sorted(without)}"


def test_the_console_script_names_a_function(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
    entry = configparser.ConfigParser()
    entry.read_string(archive.read(name).decode())
    assert dict(entry["console_scripts"]) == {"fewref": "fewref.run_benchmark:main"}
    tree = ast.parse((ROOT / "run_benchmark.py").read_text(encoding="utf-8"))
    assert "main" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def python(*arguments: object, path: list[Path], cwd: Path) -> str:
    """What a fresh interpreter prints with these folders first on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOOK = """
import json, fewref, fewref.splits
print(json.dumps([fewref.__file__, fewref.splits.load_split("builtin").layout]))
"""


def test_an_installation_finds_its_data_from_anywhere(installed, tmp_path):
    where, layout = json.loads(python("-c", LOOK, path=[installed], cwd=tmp_path))
    assert Path(where) == installed / "fewref/__init__.py"
    assert layout == "youtube"


PROBE = """
import importlib.util, json
from transformers.utils.import_utils import _is_package_available
found = importlib.util.find_spec("kernels")
import kernels, fewref.kernels
print(json.dumps([found.origin, kernels.__file__, _is_package_available("kernels", return_version=True)[1],
                  fewref.kernels.__file__]))
"""


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A folder with another distribution that is called kernels, as transformers looks for one."""
    info = tmp_path / "foreign/kernels-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n")
    (tmp_path / "foreign/kernels").mkdir()
    (tmp_path / "foreign/kernels/__init__.py").write_text("")
    return tmp_path / "foreign"


def probe(path: list[Path], cwd: Path) -> tuple[list[Path], str, Path]:
    """Where `kernels` is found and imported from, the version that transformers sees, where ours is."""
    found, imported, version, ours = json.loads(python("-c", PROBE, path=path, cwd=cwd))
    return [Path(found), Path(imported)], version, Path(ours)


def test_a_distribution_called_kernels_is_left_alone(foreign, installed, tmp_path):
    theirs = [foreign / "kernels/__init__.py"] * 2
    ours = Path(fewref.__file__).parent / "kernels/__init__.py"
    assert probe([foreign], tmp_path) == (theirs, "9.9", ours)
    assert probe([installed, foreign], tmp_path) == (theirs, "9.9", installed / "fewref/kernels/__init__.py")
    # What the layout avoids, to show that a name at the top would be taken for theirs.
    shadowed = python("-c", "import kernels; print(kernels.__file__)", path=[ROOT, foreign], cwd=tmp_path)
    assert Path(shadowed.strip()) == ROOT / "kernels/__init__.py"


SPY = """
import importlib.util
from fewref.methods.base import MethodInfo
from fewref.methods.controls import Empty
import fewref
class Spy(Empty):
    found = importlib.util.find_spec("kernels").origin
    info = MethodInfo(name="spy", summary=f"{found};{fewref.__file__}")
"""


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_the_script_hides_no_distribution(where, foreign, tmp_path):
    (foreign / "spy.py").write_text(SPY)
    cwd = ROOT if where == "checkout" else tmp_path
    script = "run_benchmark.py" if where == "checkout" else ROOT / "run_benchmark.py"
    printed = python(script, "describe", "spy:Spy", path=[foreign], cwd=cwd)
    assert f"{foreign / 'kernels/__init__.py'};{ROOT / '__init__.py'}" in printed


def test_no_source_is_too_long():
    lengths = {name: len((ROOT / name).read_bytes().splitlines()) for name in project_files() if name.endswith(".py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_file_names_a_place_on_one_machine():
    place = re.compile(rb"(?<![\w./-])/(?:work|root|Users|home)/" + rb"\w")
    assert place.search(b"see " + b"/".join((b"", b"home", b"someone")))
    found = []
    for name in project_files():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content and place.search(content):
            found.append(name)
    assert found == []
