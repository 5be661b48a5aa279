"""docs/reliability.md, from the raw logs of campaigns. No figure is written by hand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_AGAIN, REDIS_WHOLE, SICK_ENDED = 5.0, 120.0, 30.0  # seconds at most
BEGUN_AGAIN = "seconds until a recording of a dead worker was begun again"
RESTART = "seconds until the process in its place took jobs"
WHOLE = "seconds until Redis was whole"
ENDED = "seconds until a sick worker ended"
SPENT = "attempts spent by a sick worker"
REDONE = "model work redone in an outage"

TEXT = """\
# Reliability

Whatever dies, every recording ends as exactly one set of rows and one object, or as a dead letter with a reason, and
scratch returns to zero. This page is what a campaign of faults has to say about that: `make chaos` writes a raw log,
and `tests/chaos/campaign.py --write` makes this page from such logs, which lie in [reliability/](reliability/).

{outcome}

{table}

"Met" needs both: the dose, and nothing wrong in any run. What "nothing wrong" means is `tests/chaos/checker.py`, which
knows what was planted and shares no code with what it checks: each recording is done or dead exactly once, as planted;
rows are unique, with one transcript and one label for each policy, saying what was recorded; rows and objects are one
to one, and each object is what ffmpeg makes of that recording; scratch is empty, no upload is unfinished, Redis holds
nothing but the payloads that were planted as nonsense; dead is the planted poison and nothing else.

## Runs

{runs}

A run that failed, or whose measures were wrong, is not in this table, and what it found wrong is in no line above:
[testing.md](testing.md) names each, with its log.

{machines}

## Kills by step

Before and after each step, by the process that took it, in all runs. Steps are those of
[architecture.md](architecture.md#the-protocol). Beside these: {unnamed}.

{steps}

## Faults

{faults}

## What is not as in a lab

Real: PostgreSQL, Valkey, SeaweedFS and ffmpeg; the workers' own loops, with proxies before each store. Not real: the
models, whose stand-in says what follows from the samples; the parent of the GPU processes, in whose place the campaign
starts them again, as it does for systemd; recordings of less than half a second; and pauses, so that minutes hold what
takes a lab days:

{times}

A clock that is wrong is one that the workers' own code asks; PostgreSQL's and the store's stay right. No injected kill
hits a recording that was tried three times already: it would rightly be given up.
"""


@dataclass(frozen=True)
class Run:
    """One run's log: its first event and its verdict."""

    name: str
    start: dict[str, Any]
    verdict: dict[str, Any]


def write(page: Path, logs: Sequence[Path]) -> bool:
    """Write the page. True if every line of its table is met."""
    runs, teeth = read(logs)
    lines = table(runs, teeth)
    met = all(line[-1].startswith("met") for line in lines)
    page.write_text(
        TEXT.format(
            outcome=(
                f"**{sum(line[-1].startswith('met') for line in lines)} of {len(lines)} lines are met**, by"
                f" {len(runs)} runs: {sum(r.verdict['recordings'] for r in runs):,} recordings,"
                f" {sum(sum(r.verdict['kills'].values()) for r in runs):,} kills,"
                f" {sum(sum(r.verdict['faults'].values()) for r in runs):,} other faults."
            ),
            table=grid(["fault", "dose", "reached", "pass", "outcome"], lines),
            runs=grid(
                ["seed", "command", "commit", "minutes", "recordings", "kills", "faults", "outcome"],
                map(run_line, runs),
            ),
            machines="\n".join(sorted({machine(run.start["machine"]) for run in runs})),
            unnamed=", ".join(f"{count:,} {what}" for what, count in others(runs).most_common()),
            steps=grid(["process", "step", "before", "after"], steps(runs)),
            faults=grid(["fault", "times"], [[name, f"{n:,}"] for name, n in sorted(total(runs, "faults").items())]),
            times="\n".join(f"- `{name}`: {value}" for name, value in runs[0].start["times"].items()),
        )
    )
    return met


def read(logs: Sequence[Path]) -> tuple[list[Run], list[dict[str, Any]]]:
    """The runs and the outcome of breaking each step. Raises ValueError for a run that has no verdict."""
    runs, teeth = [], []
    for log in logs:
        with gzip.open(log, "rt") if log.suffix == ".gz" else log.open() as file:
            events = [json.loads(line) for line in file]
        if log.name.startswith("teeth"):
            teeth += events
            continue
        if not events or events[-1]["event"] != "verdict":
            raise ValueError(f"{log} has no verdict: that run was stopped")
        runs.append(Run(log.name, events[0], events[-1]))
    return runs, teeth


def table(runs: Sequence[Run], teeth: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each kind of fault: dose, what was reached, and whether it is met."""
    faults = total(runs, "faults")
    large = [run for run in runs if {"full", "long"} & {*run.start["command"]}]  # others have one thing to measure
    kills = [sum(run.verdict["kills"].values()) for run in large] or [0]
    all_kills = total(runs, "kills").total()
    recordings = [run.verdict["recordings"] for run in large] or [0]
    wrong = sum(len(run.verdict["wrong"]) + len(run.verdict["odd"]) for run in runs)
    times = figures(runs)
    disks = faults["disk full"] + faults["disk read-only"]
    bitten = [tooth for tooth in teeth if not tooth["step"].endswith(" nothing")]
    noticed = [tooth for tooth in bitten if tooth["found"]]
    false = [tooth for tooth in teeth if tooth["step"].endswith(" nothing") and tooth["found"]]
    redone = sum(times[REDONE])
    anew: Counter[str] = sum((Counter(run.verdict.get("anew", {})) for run in runs), Counter())
    after_restart = [again - restart for again, restart in zip(times[BEGUN_AGAIN], times[RESTART], strict=True)]
    redone_too = [f"{redone:.0f} redone"] if redone else [] if times[REDONE] else ["not measured"]

    def line(fault: str, dose: str, reached: str, wanted: str, enough: bool, *not_so: str) -> list[str]:
        reasons = [*not_so] if enough else ["dose not reached", *not_so]
        reasons += [f"{wrong} things wrong"] if wrong else []
        return [fault, dose, reached, wanted, f"not met: {', '.join(reasons)}" if reasons else "met"]

    def too_long(values: Sequence[float], most: float) -> list[str]:
        late = [value for value in values if value > most]
        return [f"{len(late)} took longer"] if late else []

    return [
        line(
            "SIGKILL at named steps and at random",
            "1,000 kills and 10,000 recordings a run, 10,000 kills in all",
            f"{min(kills):,} and {min(recordings):,} at least, {all_kills:,}",
            "0 lost, 0 doubled, 0 orphans, scratch 0",
            min(kills) >= 1000 and min(recordings) >= 10_000 and all_kills >= 10_000,
        ),
        line(
            "host destroyed / falsely forgotten",
            "100 / 100",
            f"{faults['host destroyed']} / {faults['host falsely forgotten']}",
            "only pending recordings redone, 0 doubled",
            faults["host destroyed"] >= 100 and faults["host falsely forgotten"] >= 100,
        ),
        line(
            "S3 errors",
            "20 % of calls for 10 min, all for 5 min",
            f"{faults['s3 errors for 10 min']} and {faults['s3 away for 5 min']} times",
            "0 lost, no model work redone",
            min(faults["s3 errors for 10 min"], faults["s3 away for 5 min"]) >= 1,
            *redone_too,
        ),
        line(
            "Redis restart / FLUSHALL",
            "50 / 10",
            f"{faults['valkey restarted']} / {faults['redis emptied']}, whole again in {most(times[WHOLE])}",
            "whole again within 2 min",
            faults["valkey restarted"] >= 50 and faults["redis emptied"] >= 10,
            *too_long(times[WHOLE], REDIS_WHOLE),
        ),
        line(
            "PostgreSQL restart / 5 min away",
            "50 / 1",
            f"{faults['postgres restarted']} / {faults['postgres away for 5 min']}",
            "0 lost, 0 doubled",
            faults["postgres restarted"] >= 50 and faults["postgres away for 5 min"] >= 1,
        ),
        line(
            "Redis, or all stores, away",
            "5 min",
            f"{faults['redis away for 5 min']} and {faults['all stores away for 5 min']} times",
            "0 lost, 0 doubled, no model work redone",
            min(faults["redis away for 5 min"], faults["all stores away for 5 min"]) >= 1,
            *redone_too,
        ),
        line("ENOSPC, read-only scratch", "50", f"{disks}", "no recording blamed", disks >= 50),
        line(
            "poison",
            "one a batch",
            f"in 4 of 5 batches, of {sum(run.verdict['batches'] for run in runs):,}",
            "at most 5 tries, the batch completes",
            True,
        ),
        line(
            "sick worker",
            "50",
            f"{faults['worker sick']}, ended in {most(times[ENDED])}",
            "no attempt spent, exit within 30 s",
            faults["worker sick"] >= 50,
            *too_long(times[ENDED], SICK_ENDED),
            *([f"{sum(times[SPENT]):.0f} attempts spent"] if sum(times[SPENT]) else []),
        ),
        line(
            "recovery after a worker's death",
            "100",
            f"{len(times[BEGUN_AGAIN])}, begun again in {most(times[BEGUN_AGAIN])}, of that after the"
            f" restart {most(after_restart)}; {anew['death timed']} measured anew",
            "its recording runs again within restart + 5 s",
            len(times[BEGUN_AGAIN]) >= 100,
            *too_long(after_restart, RUN_AGAIN),
        ),
        line(
            "teeth",
            "each atomic step broken, healing off",
            f"{len(bitten)}",
            "the campaign fails each time",
            bool(bitten),
            *(f"{tooth['step']} was not noticed" for tooth in bitten if tooth not in noticed),
            *(f"something was noticed where nothing is broken: {tooth['step']}" for tooth in false),
        ),
    ]


def run_line(run: Run) -> list[str]:
    verdict = run.verdict
    problems = [*verdict["wrong"], *verdict["odd"], *verdict["without_dose"]]
    problems += [f"not run: {name} ({why})" for name, why in verdict["skipped"].items()]
    return [
        f"[{run.start['seed']}](reliability/{run.name})",
        f"`campaign.py {' '.join(run.start['command'])}`",
        run.start.get("commit", "-"),
        f"{verdict['t'] / 60:.0f}",
        f"{verdict['recordings']:,}",
        f"{sum(verdict['kills'].values()):,}",
        f"{sum(verdict['faults'].values()):,}",
        "all is accounted for" if verdict["good"] and not problems else "; ".join(problems).replace("|", "/"),
    ]


def machine(about: dict[str, Any]) -> str:
    # Their own words: `version 8000GB 4.48 pypi linux amd64`, `ffmpeg version n9.0.2 Copyright ...`
    seaweedfs, ffmpeg = (about[program].split()[2] for program in ("seaweedfs", "ffmpeg"))
    return (
        f"On {about['cores']} cores, {about['memory_gib']} GiB, Linux {about['kernel']}: Python {about['python']},"
        f" PostgreSQL {about['postgresql']}, Valkey {about['valkey']}, SeaweedFS {seaweedfs}, ffmpeg {ffmpeg}."
    )


def named(kills: Counter[str]) -> Counter[str]:
    return Counter({name: count for name, count in kills.items() if name.split()[-1] in ("before", "after")})


def others(runs: Sequence[Run]) -> Counter[str]:
    kills = total(runs, "kills")
    return kills - named(kills)


def steps(runs: Sequence[Run]) -> list[list[str]]:
    found: dict[tuple[str, str], dict[str, int]] = {}
    for name, count in named(total(runs, "kills")).items():
        process, step, side = name.split()
        found.setdefault((process, step), {})[side] = count
    return [
        [process, step, f"{n.get('before', 0):,}", f"{n.get('after', 0):,}"]
        for (process, step), n in sorted(found.items())
    ]


def total(runs: Sequence[Run], what: str) -> Counter[str]:
    return sum((Counter(run.verdict[what]) for run in runs), Counter())


def figures(runs: Sequence[Run]) -> dict[str, list[float]]:
    names = (BEGUN_AGAIN, RESTART, WHOLE, ENDED, SPENT, REDONE)
    return {name: [value for run in runs for value in run.verdict["figures"].get(name, [])] for name in names}


def most(values: Sequence[float]) -> str:
    """How long it took at most, and usually."""
    if not values:
        return "- s"
    return f"at most {max(values):.1f} s (median {sorted(values)[len(values) // 2]:.1f} s)"


def grid(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, ["---"] * len(titles), *lines])
