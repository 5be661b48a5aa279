"""Run a play, and look whether a secret can be seen where none may be: canary.py ARTIFACT PLAY...; secrets by stdin.

Looked at are: the play's output; the arguments of all processes while it runs, of test hosts, too, as they are
processes of this machine; the artifact; and on each host what others than its owner may read of what was written there,
the journal, what systemd shows, and facts. Ends as the play does, with the end of what it said.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

RUN = Path(os.environ["LAB_HOSTS"]) / "end_to_end"
FRESH = 20  # looks at a process in as many rounds
LAB = ("services", "transfer", "gpu-1", "gpu-2", "gpu-3")
TOLD = (
    "journalctl --all --output=export --no-pager",
    "systemctl show --all --no-pager '*'",
    "systemctl cat --no-pager '*' 2>&1",
)


def main() -> None:
    artifact, *play = sys.argv[1:]
    secrets = {line.strip() for line in sys.stdin if line.strip()}
    forms = {form.encode() for secret in secrets for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])}
    seen: set[str] = set()

    def look(where: str, text: bytes) -> None:
        if any(form in text for form in forms):
            seen.add(where)

    with tempfile.TemporaryFile() as output:
        running = subprocess.Popen(play, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        rounds, looked = 0, Counter[str]()
        while running.poll() is None:
            rounds += 1
            there = {path.name for path in Path("/proc").glob("[0-9]*")}
            looked = Counter({name: looked[name] for name in there})
            # A process gets its arguments soon after it begins, if it begins another program; later only now and then.
            for name in (name for name in there if looked[name] < FRESH or rounds % FRESH == 0):
                looked[name] += 1
                try:
                    arguments = Path("/proc", name, "cmdline").read_bytes()
                except OSError:  # it has ended
                    continue
                look(f"arguments of {arguments[:40]!r}", arguments)
            time.sleep(0.01)
        output.seek(0)
        said = output.read()
    look("the play's output", said)
    # PLAY has its inventories first.
    facts = ["ansible", *play[1 : play.index("-vvvv")], "all", "--module-name=setup"]
    look("facts", subprocess.run(facts, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout)
    with tarfile.open(artifact) as tar:
        for member in tar:
            if file := tar.extractfile(member):
                look(f"artifact: {member.name}", file.read())
    for host in (host for host in LAB if (RUN / "disks" / host / "changes").exists()):
        for command in TOLD:
            look(f"{host}: {command}", ssh(host, command))
        if not files(RUN / "disks" / host / "changes", host, look):
            sys.exit(f"{host}: there is no file to look at")
    if seen:
        sys.exit(f"secrets can be seen: {'; '.join(sorted(seen))}")
    print(said[-20_000:].decode(errors="replace"))
    print(f"no secret was seen, arguments looked at {rounds} times, {len(said)} bytes of output")
    sys.exit(running.returncode)


def files(top: Path, host: str, look: Callable[[str, bytes], None]) -> int:
    """What others may read of what the host has written: in a file of theirs or, by directories of theirs, of all's.

    Returns how many files were looked at.
    """
    count = 0
    for directory, names, found in os.walk(top):
        names[:] = [n for n in names if stat.S_IMODE((Path(directory) / n).lstat().st_mode) & 0o011]
        for path in (Path(directory, name) for name in found):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode) and mode & 0o044:
                look(f"{host}: /{path.relative_to(top)}", path.read_bytes())
                count += 1
    return count


def ssh(host: str, command: str) -> bytes:
    argv = ["ssh", "-F", str(RUN / "ssh_config"), host, command]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.stdout or sys.exit(f"{host}: {command}: {done.stderr.decode(errors='replace')}")


if __name__ == "__main__":
    main()
