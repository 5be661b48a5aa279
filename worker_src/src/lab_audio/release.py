"""Which release of this package runs."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata


@cache
def release() -> str:
    """The version, and where it is an installed wheel eight digits of its code: `0.1.0+1a2b3c4d`."""
    package = metadata.distribution("lab-audio")
    files = [line for line in (package.read_text("RECORD") or "").splitlines() if line.startswith("lab_audio/")]
    code = "\n".join(sorted(line for line in files if "sha256=" in line))
    return package.version + (f"+{hashlib.sha256(code.encode()).hexdigest()[:8]}" if code else "")
