"""What the speed tables say of the machine that they were made on."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PR_SET_THP_DISABLE = 41  # of Linux's prctl
LIBRARIES = ("torch", "numpy", "numba", "triton", "opencv-python-headless")


def machine_line() -> str:
    """One line of Markdown: processor, GPU where there is one, threads, system, versions and the day."""
    cores = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    devices = [cores] + ([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])
    names = [f"Python {platform.python_version()}", *filter(None, map(_version, LIBRARIES))]
    return f"{'; '.join(devices)}; {platform.system()}; {', '.join(names)}; {date.today().isoformat()}."


def _processor() -> str:
    """The processor's name; on Linux the machine's own words for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


@contextmanager
def without_huge_pages() -> Iterator[None]:
    """Inside, new memory comes in pages of the usual size, whatever was asked for. Only Linux knows others."""
    set_disabled = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: 0
    set_disabled(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        set_disabled(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def forget_peak() -> int:
    """Bytes that this process has in memory; from here on `peak_bytes` is counted anew (where the system is Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return _status("VmRSS")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """Most bytes that this process had in memory since `forget_peak`; where that cannot be asked for, since its
    start."""
    try:
        return _status("VmHWM")
    except OSError:
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
