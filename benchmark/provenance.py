"""Where a run's numbers come from: everything that defines them, and the machine that made them."""

from __future__ import annotations

import dataclasses
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
from fewref.kernels.dispatch import report
from fewref.methods.adaptation.adapted import Adapted
from fewref.methods.adaptation.meta import rates_path
from fewref.methods.adaptation.options import AdaptOptions
from fewref.methods.base import UNTRAINED, Method
from fewref.methods.weights import sha256

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "numpy",
    "numba",
    "triton",
    "scipy",
    "pillow",
    "pycocotools",
)
PEAK_CUDA = "torch.cuda.max_memory_allocated of the query and its episode's adapt"
PEAK_CPU = "ru_maxrss of the process so far"


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

    run: see `run_id`. defines: what the rows depend on; a run is only taken up if all of it is equal. Its `adaptation`
    holds the `AdaptOptions`, None without a strategy; it has the `fast_ways` that are taken. adapted_weights: names of
    the weights that a strategy may change. environment: what should not matter (machine, versions, command), see
    `environment`. extras: further defining values of the caller. Raises InputError where the checkpoint cannot be read.
    """
    adapted = method if isinstance(method, Adapted) else None
    cls = type(adapted.method if adapted else method)
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
        "adaptation": plain(adapted.options) if adapted else None,
    }
    defines |= {name: value for name, value in fast_ways(method).items() if value}
    if adapted and adapted.strategy == "meta-sgd":
        defines["rates_sha256"] = sha256(rates_path(Path(method.weights)))
    made = {
        "format": 1,
        "run": run_id(defines),
        "defines": defines,
        "environment": environment(method.device, method.precision),
    }
    return made | ({"adapted_weights": list(adapted.names)} if adapted else {})


def fast_ways(method: Method) -> dict[str, Any]:
    """What changes answers by float rounding alone: batch, windows at once, None for one; compile, False without.

    Left out of a header where it is not taken, so that runs from before there was any can be taken up.
    """
    return {"batch": method.batch if method.batch > 1 else None, "compile": method.compile}


def run_id(defines: dict[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of `defines`; no adaptation counts as an absent one, so that runs from before
    there was any keep their id."""
    known = {name: value for name, value in defines.items() if name != "adaptation" or value is not None}
    return hashlib.sha256(canonical_json(known).encode()).hexdigest()[:12]


def plain(options: AdaptOptions) -> dict[str, Any]:
    """Options as JSON values."""
    values = dataclasses.asdict(options)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def checkpoint_sha256(method: Method) -> str | None:
    """64 hex digits of the method's checkpoint, "untrained", or None. Raises InputError for an unreadable file."""
    if method.weights is None or method.weights == UNTRAINED:
        return method.weights
    return sha256(Path(method.weights))


def environment(device: str, precision: str = "fp32") -> dict[str, Any]:
    """Machine, versions and command line; `peak_memory` says how `Row.peak_bytes` was measured.

    kernels: what each operator runs on, see `kernels.dispatch`. Raises ValueError where a forced one cannot run.
    """
    on_cuda = torch.device(device).type == "cuda"
    return {
        "git": git_state(Path(fewref.__file__).resolve().parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "kernels": report(device, torch.bfloat16 if precision == "bf16" else torch.float32),
        "peak_memory": PEAK_CUDA if on_cuda else PEAK_CPU,
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
