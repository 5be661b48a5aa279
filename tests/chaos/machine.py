"""The machine and the programs of a run, for its report."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psycopg2
import redis

from seaweedfs import weed


def about(stack: Any) -> dict[str, Any]:
    """Cores, memory, kernel, and versions of stores and ffmpeg."""
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    connection = psycopg2.connect(stack.env["DATABASE_URL"])
    with redis.Redis.from_url(stack.env["REDIS_URL"]) as client:
        valkey = client.info("server")
    found = {
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.split()[1]) / 2**20),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "postgresql": str(connection.server_version // 10000) + "." + str(connection.server_version % 10000),
        "valkey": valkey.get("valkey_version") or valkey.get("redis_version"),
        "seaweedfs": _first_line(weed(), "version"),
        "ffmpeg": _first_line("ffmpeg", "-version"),
        "boto3": metadata.version("boto3"),
    }
    connection.close()
    return found


def _first_line(*command: str) -> str:
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    return " ".join(said.decode(errors="replace").splitlines()[:1])[:80]


def commit() -> str:
    """What was tried: the checkout's commit, with `-dirty` where it was changed since; empty outside of a checkout."""
    return _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*")
