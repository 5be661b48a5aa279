"""`make test`: lint, the collection's sanity, every tier of tests, and the chaos campaign, each with result and time.

run.py [lint] [sanity] [TIER...] runs only those. REQUIRE_ALL=1: what cannot run here fails; else it is only said.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CACHE = CHECKOUT / ".cache"
COVERAGE = CACHE / "coverage"
REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"
NO_TESTS = 5
CAMPAIGN = "chaos"
SANITY = "sanity"
MOLECULE = "molecule"
HOSTS = CHECKOUT / "tests" / "hosts" / "hosts.py"
LEAVE_SECONDS = 10
CLEAN_UP_SECONDS = 120
PR_SET_CHILD_SUBREAPER = 36
OURS: set[int] = set()  # children that are no leftover of a test

# Tiers: where their tests lie, and how two processes share them: by file where a file's tests share a server or model.
TIERS = {
    "modules": ("tests/modules", ["-n2", "--dist=loadfile"]),
    "unit": ("tests/worker/unit", ["-n2", "--dist=worksteal"]),
    "fuzz": ("tests/worker/fuzz", ["-n2", "--dist=worksteal"]),
    "contract": ("tests/worker/contract", ["-n2", "--dist=worksteal"]),
    "integration": ("tests/worker/integration", ["-n2", "--dist=loadfile"]),
    "protocol": ("tests/worker/protocol", ["-n2", "--dist=worksteal"]),
    "end_to_end": ("tests/worker/end_to_end", []),
    "hosts": ("tests/hosts", []),
}
# Of the lines of the modules and module_utils, in percent.
COVERED = 90
CONFIG = "worker_src/pyproject.toml"
PYTHON = ["worker_src", "plugins", "tests", "molecule"]
LINT = {
    "ruff check": (".", ["ruff", "check", "--config", CONFIG, *PYTHON]),
    "ruff format": (".", ["ruff", "format", "--check", "--config", CONFIG, *PYTHON]),
    "mypy --strict": ("worker_src", ["mypy"]),
    "lint-imports": ("worker_src", ["lint-imports", "--cache-dir", str(CACHE / "imports")]),
}


@dataclass
class Outcome:
    """`skipped`: how many tests did not run, by reason; `wrong`: what failed, a line each."""

    ok: bool
    note: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0
    cores: float = 0


def measured(work: Callable[..., Outcome], *given: object) -> Outcome:
    """Do it, and note how long it took and how many of the machine's cores were busy meanwhile."""
    began, busy = time.monotonic(), busy_seconds()
    outcome = work(*given)
    outcome.seconds = time.monotonic() - began
    outcome.cores = (busy_seconds() - busy) / max(outcome.seconds, 0.01)
    return outcome


def busy_seconds() -> float:
    """Of all cores since the machine was started, by proc(5)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def main(wanted: list[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's `&` has it ignored, and by our children, too
    # Whatever a test leaves behind becomes our child, so that it can be named and ended.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    unknown = set(wanted) - {"lint", SANITY, *TIERS, MOLECULE, CAMPAIGN}
    if unknown:
        known = ["lint", SANITY, *TIERS, MOLECULE, CAMPAIGN]
        print(f"not a tier: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return 2
    outcomes: dict[str, Outcome] = {}
    beside = None
    try:
        if not wanted or "lint" in wanted:
            for name, (directory, command) in LINT.items():
                outcomes[name] = measured(lint, name, CHECKOUT / directory, command)
        if not wanted or SANITY in wanted:
            outcomes[SANITY] = measured(lint, SANITY, CHECKOUT, [str(CHECKOUT / "tests" / "modules" / "sanity.sh")])
        if not wanted:
            beside = start_beside()
        for name in TIERS:
            if not wanted or name in wanted:
                outcomes[name] = measured(tier, name)
                if name == "modules":
                    outcomes["coverage"] = measured(coverage)
        if MOLECULE in wanted:
            outcomes[MOLECULE] = measured(molecule)
        if beside is not None:
            outcomes[MOLECULE] = measured(finish, beside)
        if not wanted or CAMPAIGN in wanted:
            outcomes[CAMPAIGN] = measured(campaign)
    except KeyboardInterrupt:  # Ctrl-C reaches the other process, too, which has hosts to remove
        with contextlib.suppress(subprocess.TimeoutExpired):
            if beside is not None:
                beside.wait(timeout=CLEAN_UP_SECONDS)
        return 130
    finally:
        if beside is not None and beside.poll() is None:
            beside.terminate()
            beside.wait()
        end_leftovers(0)
    return report(outcomes)


def leave(number: int, _: object) -> None:
    """End by a signal. A second one, from timeout(1), which tells all, and from us, does not break off cleaning up."""
    for again in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(again, lambda *_: None)
    sys.exit(128 + number)


def start_beside() -> subprocess.Popen[bytes]:
    """Molecule, which waits more than it works, in a process that cleans up after itself; it is quoted at its end."""
    log = CACHE / "results" / "beside.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        command = ["setpriv", "--pdeathsig", "TERM", sys.executable, __file__, MOLECULE]
        process = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    OURS.add(process.pid)
    return process


def finish(beside: subprocess.Popen[bytes]) -> Outcome:
    code = beside.wait()
    print((CACHE / "results" / "beside.log").read_text(errors="replace"), flush=True)
    return Outcome(code == 0, "began beside the others; as it says above")


def lint(name: str, directory: Path, command: list[str]) -> Outcome:
    say(name)
    code = run([str(BIN / command[0]), *command[1:]], directory)
    return Outcome(code == 0)


def tier(name: str) -> Outcome:
    say(name)
    results = CACHE / "results" / f"{name}.xml"
    results.unlink(missing_ok=True)
    where, shared = TIERS[name]
    measured = {"COVERAGE_FILE": str(COVERAGE / "run")} if name == "modules" else None
    if measured:
        shutil.rmtree(COVERAGE, ignore_errors=True)
        COVERAGE.mkdir(parents=True)
    code = run([sys.executable, "-m", "pytest", "-q", where, f"--junitxml={results}", *shared], CHECKOUT, measured)
    left = end_leftovers(LEAVE_SECONDS)
    outcome = Outcome(code == 0, skipped=skips(results), wrong=failures(results))
    if code == NO_TESTS:
        outcome = Outcome(True, skipped=Counter({f"{where} has no tests": 1}))
    if left:
        outcome.ok, outcome.note = False, f"left running: {'; '.join(left)}"
    elif REQUIRE_ALL and outcome.skipped:
        outcome.ok, outcome.note = False, "REQUIRE_ALL=1, and not all of it ran"
    return outcome


def molecule() -> Outcome:
    """Each role on hosts with systemd."""
    say(MOLECULE)
    if os.getuid() != 0:
        return Outcome(not REQUIRE_ALL, skipped=Counter({"test hosts need root": 1}))
    try:
        code = run([str(CHECKOUT / "molecule" / "run.sh"), "all"], CHECKOUT)
    finally:
        left = end_leftovers(LEAVE_SECONDS)
        for scenario in CHECKOUT.glob("molecule/*/molecule.yml"):
            run([sys.executable, str(HOSTS), "--run", scenario.parent.name, "destroy", "--all"], CHECKOUT)
    return Outcome(code == 0 and not left, f"left running: {'; '.join(left)}" if left else "")


def campaign() -> Outcome:
    """Five minutes in which every step is killed and everything goes wrong once."""
    say(CAMPAIGN)
    code = run([sys.executable, "tests/chaos/campaign.py"], CHECKOUT)
    left = end_leftovers(LEAVE_SECONDS)
    note = f"left running: {'; '.join(left)}" if left else ""
    return Outcome(code == 0 and not left, note, wrong=verdict() if code else [])


def coverage() -> Outcome:
    """How much of the modules their tests have run; what was killed could not say."""
    data = f"--data-file={COVERAGE / 'run'}"
    program = [sys.executable, "-m", "coverage"]
    code = run([*program, "combine", "-q", data, str(COVERAGE)], CHECKOUT)
    only = "--include=*/plugins/modules/*,*/plugins/module_utils/*"
    code = code or run([*program, "report", data, only, f"--fail-under={COVERED}", "--skip-empty"], CHECKOUT)
    return Outcome(code == 0)


def run(command: list[str], directory: Path, more: dict[str, str] | None = None) -> int:
    """Run a command to its end; it is killed with us."""
    env = {
        **os.environ,
        **(more or {}),
        "XDG_CACHE_HOME": str(CACHE),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "torchinductor"),
        "MPLCONFIGDIR": str(CACHE / "matplotlib"),
        "RUFF_CACHE_DIR": str(CACHE / "ruff"),
        "MYPY_CACHE_DIR": str(CACHE / "mypy"),
    }
    return subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", *command],
        cwd=directory,
        env=env,
        stdin=subprocess.DEVNULL,
        check=False,
    ).returncode


def skips(results: Path) -> Counter[str]:
    """Reasons of the tests that were skipped, with how many each."""
    if not results.exists():
        return Counter()
    found = (case.get("message") or "no reason given" for case in ET.parse(results).iter("skipped"))
    return Counter(found)


def failures(results: Path) -> list[str]:
    """Names of the tests that failed."""
    if not results.exists():
        return []
    cases = ET.parse(results).iter("testcase")
    return [f"{c.get('classname')}.{c.get('name')}" for c in cases if {"failure", "error"} & {e.tag for e in c}]


def verdict() -> list[str]:
    """What the newest campaign found."""
    logs = sorted((CACHE / "chaos").glob("seed-*.jsonl"), key=lambda log: log.stat().st_mtime)
    lasts = [(log.stem, json.loads(line)) for log in logs[-1:] for line in log.read_text().splitlines()[-1:]]
    whats = ("wrong", "odd", "without_dose")
    return [f"{seed}: {line}" for seed, last in lasts for what in whats for line in last.get(what, [])]


def end_leftovers(grace: float) -> list[str]:
    """Wait for our children to end, kill those that do not, and return their command lines."""
    deadline = time.monotonic() + grace
    left: dict[int, str] = {}
    while pids := children():
        with contextlib.suppress(ChildProcessError):
            for pid in pids:
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            for pid in children():
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                    left[pid] = command.decode(errors="replace")
                    os.kill(pid, signal.SIGKILL)
        if pids == children():
            time.sleep(0.05)
    return [f"{pid} {command.strip()[:100]}" for pid, command in left.items()]


def children() -> list[int]:
    pids = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    return [pid for pid in pids if pid not in OURS]


def report(outcomes: dict[str, Outcome]) -> int:
    print()
    for name, outcome in outcomes.items():
        for reason, count in outcome.skipped.items():
            tests = "" if count == 1 else f"{count} tests: "
            print(f"NOT RUN: {name}: {tests}{reason}")
    for name, outcome in outcomes.items():
        for line in outcome.wrong:
            print(f"FAILED: {name}: {line}")
    for name, outcome in outcomes.items():
        word = "passed" if outcome.ok else "FAILED"
        print(f"{name:14} {word} {outcome.seconds:7.1f} s  {outcome.cores:3.1f} cores  {outcome.note}".rstrip())
    total = sum(outcome.seconds for outcome in outcomes.values())
    good = all(outcome.ok for outcome in outcomes.values())
    print(f"{'all' if good else 'NOT all'} passed in {total / 60:.1f} min", flush=True)
    return 0 if good else 1


def say(name: str) -> None:
    print(f"\n== {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
