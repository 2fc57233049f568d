"""Where a run's numbers come from: everything that defines them, and the machine that made them."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fewref
from fewref.episodes.manifest import Manifest
from fewref.episodes.types import canonical_json
from fewref.kernels.dispatch import backend_in_use
from fewref.methods.base import UNTRAINED, Method
from fewref.methods.weights import sha256

LIBRARIES = ("torch", "torchvision", "transformers", "timm", "numpy", "scipy", "pillow", "pycocotools")


def header(
    *,
    method: Method,
    method_name: str,
    manifest: Manifest,
    scoring: Sequence[str],
    text: str = "right",
    support: str = "right",
    extras: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A run's header as plain JSON values.

    run: first 12 hex digits of the SHA-256 of `defines`. defines: what the rows depend on; a run is only taken up if
    all of it is equal. environment: what should not matter (machine, versions, command), see `environment`.
    extras: further defining values of the caller. Raises InputError where the checkpoint cannot be read.
    """
    cls = type(method)
    defines = {
        "version": fewref.__version__,
        "method": method_name,
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "sees_truth": method.info.sees_truth,
        "config": method.config,
        "precision": method.precision,
        "window": method.window,
        "seed": method.seed,
        "device": torch.device(method.device).type,
        "checkpoint_sha256": checkpoint_sha256(method),
        "parameters": method.parameters(),
        "dataset": manifest.dataset,
        "group": manifest.group,
        "metadata_hash": manifest.metadata_hash,
        "manifest_hash": manifest.hash,
        "episodes": dict(manifest.protocol),
        "scoring": list(scoring),
        "text": text,
        "support": support,
        "extras": dict(extras or {}),
    }
    run = hashlib.sha256(canonical_json(defines).encode()).hexdigest()[:12]
    return {"format": 1, "run": run, "defines": defines, "environment": environment(method.device)}


def checkpoint_sha256(method: Method) -> str | None:
    """64 hex digits of the method's checkpoint, "untrained", or None. Raises InputError for an unreadable file."""
    if method.weights is None or method.weights == UNTRAINED:
        return method.weights
    return sha256(Path(method.weights))


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and command line; `peak_memory` says how `Row.peak_bytes` was measured. Never fails."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "git": git_state(Path(fewref.__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "kernels": backend_in_use(),
        "peak_memory": "torch.cuda.max_memory_allocated of the query" if on_cuda else "ru_maxrss of the process so far",
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"sha": 40 hex digits, "dirty": uncommitted changes} of a checkout whose root is `folder`; None elsewhere."""

    def git(*arguments: str) -> str:
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, env=quiet).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None  # installed below the checkout of something else
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
