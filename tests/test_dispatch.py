"""Which backend runs: the order of the wishes, what is installed, and one clear line where a wish cannot be met."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

from fewref.kernels import dispatch
from fewref.kernels.dispatch import BACKENDS, ENVIRONMENT, OPS, choose, differentiable_twice, report, using

SAMPLING = "deformable_attention"


@pytest.fixture(autouse=True)
def free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "import_problem", lambda backend: "")


@pytest.fixture
def none_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"numba": "numba is not installed; pip install numba", "triton": "triton is not installed; pip install"}
    monkeypatch.setattr(dispatch, "import_problem", lambda backend: told.get(backend, ""))


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("device", "dtype", "wanted"),
    [
        ("cpu", torch.float32, "numba"),
        ("cpu", torch.bfloat16, "numba"),
        ("cpu", torch.float64, "reference"),
        ("cuda", torch.float16, "triton"),
        ("cuda", torch.float64, "reference"),
        ("mps", torch.float32, "pytorch"),
    ],
)
def test_the_fastest_one_for_the_device(device: str, dtype: torch.dtype, wanted: str) -> None:
    assert choose(SAMPLING, device, dtype) == wanted
    assert choose(SAMPLING, torch.device(device), dtype) == wanted
    assert {choose(op, device, dtype) for op in OPS if op != SAMPLING} == {"pytorch"}


@pytest.mark.usefixtures("all_installed")
def test_the_argument_comes_before_using_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "pytorch")
    assert choose(SAMPLING, "cpu") == "pytorch"
    with using("reference"):
        assert choose(SAMPLING, "cpu") == "reference"
        assert choose(SAMPLING, "cpu", backend="numba") == "numba"
        with using(None):
            assert choose(SAMPLING, "cpu") == "pytorch"
    assert choose(SAMPLING, "cpu") == "pytorch"


@pytest.mark.usefixtures("all_installed")
def test_without_a_form_in_the_forced_backend_it_is_pytorch() -> None:
    assert choose("affinity", "cpu", backend="numba") == "pytorch"
    assert choose("affinity", "cpu", backend="triton") == "pytorch"
    assert choose(SAMPLING, "cpu", torch.float64, "numba") == "pytorch"
    assert choose("affinity", "cpu", backend="reference") == "reference"


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize("forced", [None, "numba"])
def test_two_derivatives_take_the_reference(forced: str | None) -> None:
    with differentiable_twice(), using(forced) if forced else nullcontext():
        assert choose(SAMPLING, "cpu") == "reference"
    assert choose(SAMPLING, "cpu") == "numba"


@pytest.mark.usefixtures("all_installed")
def test_triton_on_a_cpu_needs_its_interpreter_and_a_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="CUDA device, or with TRITON_INTERPRET=1 slowly on a CPU, not on 'cpu'"):
        choose(SAMPLING, "cpu", backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(SAMPLING, "cpu", backend="triton") == "triton"
    assert choose(SAMPLING, "cpu") == "numba"


@pytest.mark.usefixtures("all_installed")
def test_numba_is_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="'numba': runs on a CPU, not on 'cuda'"):
        choose(SAMPLING, "cuda", backend="numba")


@pytest.mark.usefixtures("none_installed")
def test_what_is_not_installed_is_passed_over_and_told() -> None:
    assert choose(SAMPLING, "cpu") == "pytorch"
    assert choose(SAMPLING, "cuda") == "pytorch"
    assert report("cpu")[SAMPLING] == "pytorch (numba is not installed; pip install numba)"
    assert report("cpu")["affinity"] == "pytorch"
    with pytest.raises(ValueError, match="kernels 'numba': numba is not installed; pip install numba"):
        choose(SAMPLING, "cpu", backend="numba")
    with pytest.raises(ValueError, match="pip install"), using("triton"):
        pass


def test_a_broken_library_is_passed_over_and_told(tmp_path) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba/__init__.py").write_text("raise ImportError('Numba needs NumPy 9.9 or less')")
    script = "from fewref.kernels.dispatch import report; print(report('cpu')['deformable_attention'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script] if sys.version_info >= (3, 11) else [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    want = "pytorch (numba cannot be imported (ImportError: Numba needs NumPy 9.9 or less); reinstall numba)"
    assert done.stdout.strip() == want


def test_unknown_names_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="^kernels 'cuda': no such kernels; choose from reference, pytorch"):
        choose(SAMPLING, "cpu", backend="cuda")
    with pytest.raises(ValueError, match="no such kernels"), using("fast"):
        pass
    with pytest.raises(ValueError, match="'convolution' is no operator"):
        choose("convolution", "cpu")
    monkeypatch.setenv(ENVIRONMENT, "numbat")
    with pytest.raises(ValueError, match="^FEWREF_KERNELS='numbat': no such kernels"):
        choose("affinity", "cpu")


def test_the_report_names_every_operator() -> None:
    with using("reference"):
        told = report("cpu")
    assert set(told) == set(OPS)
    assert {told[op] for op in OPS if op != "mask_scores"} == {"reference"}
    assert told["mask_scores"] == "numpy"
    told = report("cpu", torch.bfloat16)
    assert told[SAMPLING].split()[0] in BACKENDS
    if find_spec("numba"):
        assert told[SAMPLING] == "numba"


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path) -> None:
    script = (
        "import sys; import fewref.kernels.deformable_attention; from fewref.kernels.dispatch import choose\n"
        "choose('affinity', 'cpu'); choose('deformable_attention', 'cpu', backend='pytorch')\n"
        "print([name for name in ('numba', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
