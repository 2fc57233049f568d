"""The one exception that a user sees, and the files that must never be half-written."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


class InputError(Exception):
    """Bad input: one line which names the file, video or option and how to mend it; the exit code is 2."""


def near(wrong: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: `did you mean 'cma'?`, or the list of all known names where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"choose from {', '.join(known)}"


def read_json(path: Path) -> object:
    """Parse a UTF-8 JSON file. Raises InputError (naming the file, and the line for a syntax error)."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        fault = f"not valid JSON (line {error.lineno}: {error.msg})"
        raise InputError(f"{path}: {fault}; download or write it again") from None


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write text (UTF-8) or bytes to `path` so that a reader sees the old file or the whole new one, never a part.

    Makes missing parent folders. Raises InputError where the place is not writable.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another output folder") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another output folder") from None
        raise
