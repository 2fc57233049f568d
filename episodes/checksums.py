"""SHA-256 lists of a dataset folder in the format of `sha256sum`, so that either tool can check the other's file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tqdm import tqdm

from fewref.episodes.errors import InputError, write_atomic


def write_checksums(root: Path, out: Path, progress: bool = True) -> int:
    """Write `out`: a line `<sha256>  <path below root>` for every file below `root`, sorted; returns their number.

    `out` itself is left out, also where it lies below `root`. Raises InputError where a file cannot be read or written.
    """
    files = [file for file in _files(root) if file.resolve() != Path(out).resolve()]
    if not files:
        raise InputError(f"{root}: no files here; point --data-root at the dataset's folder")
    odd = [name for file in files if {"\n", "\\"} & set(name := str(file.relative_to(root)))]
    if odd:
        raise InputError(f"{root}: {odd[0]!r} cannot stand in a list of checksums; rename the file")
    bar = tqdm(files, desc="checksums", unit="file", disable=not progress)
    lines = [f"{_sha256(file)}  {file.relative_to(root).as_posix()}\n" for file in bar]
    write_atomic(Path(out), "".join(lines))
    return len(lines)


def verify_checksums(root: Path, file: Path, progress: bool = True) -> list[str]:
    """Faults, one line each: files below `root` that changed, are missing, or are not in the list `file`.

    Raises InputError where `file` cannot be read or is no such list.
    """
    wanted = _read_list(Path(file))
    faults = []
    for name in tqdm(sorted(wanted), desc="checksums", unit="file", disable=not progress):
        path = Path(root) / name
        if not path.is_file():
            faults.append(f"{path}: missing; fetch it again")
        elif _sha256(path) != wanted[name]:
            faults.append(f"{path}: content differs from {file}; fetch it again")
    present = [path for path in _files(root) if path.resolve() != Path(file).resolve()]
    extra = [path for path in present if path.relative_to(root).as_posix() not in wanted]
    return faults + [f"{path}: not in {file}" for path in extra]


def _read_list(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: checksums cannot be read ({error}); write them with --checksums write") from None
    wanted = {}
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        digest, name = line[:64], line[66:]
        if len(digest) != 64 or set(digest) - set("0123456789abcdef") or line[64:66] not in ("  ", " *") or not name:
            raise InputError(f"{file}: line {number} is not '<sha256>  <path>'; write the list again")
        wanted[name] = digest
    return wanted


def _files(root: Path) -> list[Path]:
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder; point --data-root at the dataset's folder")
    found = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    return sorted(path for path in found if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
