"""The same by coverage: guided.py TARGET [-max_total_time=3600 ...] (libFuzzer's options).

What is found is kept in .cache/fuzz/TARGET; a failure is written there as crash-*, and this ends with its traceback.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import atheris

CHECKOUT = Path(__file__).parents[3]
sys.path[:0] = [str(CHECKOUT / "tests" / "worker" / "protocol")]  # where the corpus of hostile archives is

with atheris.instrument_imports(include=["lab_audio", "tarfile"]):
    from targets import TARGETS


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nTARGET is one of {', '.join(TARGETS)}")
    target = TARGETS[sys.argv[1]]
    kept = CHECKOUT / ".cache" / "fuzz" / sys.argv[1]
    kept.mkdir(parents=True, exist_ok=True)
    for data in target.seeds:
        (kept / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    options = ["-max_len=100000", "-rss_limit_mb=4096", f"-artifact_prefix={kept}/", *sys.argv[2:]]
    atheris.Setup([sys.argv[0], *options, str(kept)], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
