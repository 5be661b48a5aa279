"""What a directory of weights is, in a few characters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_MIB = 1 << 20


def revision(directory: Path) -> str:
    """The revision named in the directory's manifest.json, else a fingerprint of 16 hex digits.

    The fingerprint covers every file's relative name, size and content (above 1 MiB its first and last MiB),
    so 18 GB take a moment. Hidden files, such as a downloader's bookkeeping, do not count.
    """
    try:
        named = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["revision"]
        if isinstance(named, str) and named:
            return named
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = hashlib.sha256()
    for name, path in sorted((p.relative_to(directory).as_posix(), p) for p in directory.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in name.split("/")):
            continue
        size = path.stat().st_size
        digest.update(json.dumps([name, size]).encode())
        with path.open("rb") as file:
            digest.update(file.read(_MIB))
            if size > _MIB:
                file.seek(max(_MIB, size - _MIB))
                digest.update(file.read(_MIB))
    return digest.hexdigest()[:16]


def damage(directory: Path) -> list[str]:
    """Files that the directory's manifest.json names and that are missing or of another size; none without one.

    Raises OSError, ValueError where the manifest cannot be read.
    """
    path = directory / "manifest.json"
    if not path.exists():
        return []
    try:
        named = {file["path"]: file["size"] for file in json.loads(path.read_text(encoding="utf-8"))["files"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest") from error
    return sorted(name for name, size in named.items() if _size(directory / name) != size)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
