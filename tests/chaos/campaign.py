"""The chaos campaign: real stores, real ffmpeg, the project's workers, and everything that can go wrong, by a seed.

    campaign.py --seed 1 --minutes 5       one run; 0 if all is accounted for and each step and fault had its dose
    campaign.py --teeth                    each atomic step broken in turn: the campaign has to notice it
    campaign.py --write docs/reliability.md docs/reliability/*.jsonl.gz    the table, from the logs of such runs

Only the models have a stand-in. Pauses are shorter than a lab's (workers.TIMES), so that minutes hold weeks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
# What is imported below needs it, hence E402.
sys.path.insert(0, str(CHECKOUT / "tests" / "stack"))

from checker import Stores, wrongs  # noqa: E402
from disks import Disk  # noqa: E402
from driver import HOSTS, ON_LOOP, STUCK_SECONDS, Driver, Place  # noqa: E402
from machine import about, commit  # noqa: E402
from nemesis import DOSES, HOST_FAULTS, LEAST, ONLY, STORE_FAULTS, nemesis  # noqa: E402
from planting import BATCH_FILES, arriving  # noqa: E402
from proxies import Proxies, port_of  # noqa: E402
from recordings import make_recordings  # noqa: E402
from reliability import write  # noqa: E402
from stack import Stack  # noqa: E402
from workers import ROLES, TIMES, Board, Nursery, not_killed  # noqa: E402


@contextmanager
def prepared(seed: int) -> Iterator[Place]:
    """Servers, proxies, a disk, recordings, and all that is to be there before the first fork."""
    with ExitStack() as ending:
        directory = Path(tempfile.mkdtemp(prefix="lab-audio-chaos-"))
        directory.chmod(0o755)
        ending.callback(shutil.rmtree, directory, ignore_errors=True)
        (directory / "source").mkdir()
        for host in HOSTS:
            (directory / "hosts" / host).mkdir(parents=True)
        disk = Disk(directory / "hosts" / ON_LOOP)
        ending.callback(disk.close)
        disk.mount()
        quick_ffmpeg(directory / "bin")
        recordings = make_recordings()
        stack = ending.enter_context(Stack(directory))
        stores = {"s3": "S3_ENDPOINT", "redis": "REDIS_URL", "postgres": "DATABASE_URL"}
        ports = {store: port_of(stack.env[name]) for store, name in stores.items()}
        proxies = Proxies(ports, seed)
        ending.callback(proxies.close)
        env = {
            **stack.env,
            **{n: stack.env[n].replace(f":{ports[s]}", f":{proxies.at[s]}") for s, n in stores.items()},
            "SOURCE": str(directory / "source"),
            "SOURCE_FATE": "delete",
            "SETTLE_SECONDS": "0",
            "SCAN_SECONDS": "1",
            "BATCH_FILES": str(BATCH_FILES),
            "TRANSFER_TMP": str(directory / "tmp"),
            "TRANSCODE_THREADS": "2",
            "CLASSIFY_BATCH": "4",
            "UPLOAD_THREADS": "2",
        }
        migrate(stack.env["DATABASE_URL"])
        report, told = os.pipe()
        os.set_blocking(report, False)
        board = Board(64)
        fates = {r.words: fate for fate, some in recordings.items() for r in some if r.words}
        nursery = Nursery(env, directory, board, told, fates)
        scratches = [directory / "hosts" / host / "scratch" for host in HOSTS]
        reads = Stores.of(stack.env, directory / "source", scratches)
        yield Place(directory, stack, proxies, disk, nursery, board, report, reads, recordings)


def quick_ffmpeg(directory: Path) -> None:
    """The ffmpeg of imageio-ffmpeg comes first in PATH: linked statically, it starts four times as fast."""
    import imageio_ffmpeg

    directory.mkdir()
    (directory / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"


def migrate(database_url: str) -> None:
    from lab_audio import config, ledger

    os.environ["DATABASE_URL"] = database_url
    engine = ledger.open_ledger(config.load(config.LedgerSettings))
    ledger.migrate(engine)
    engine.dispose()


def run(options: argparse.Namespace) -> int:
    """One campaign; its raw log is `seed-N.jsonl` in the report's directory."""
    log = options.report / f"seed-{options.seed}.jsonl"
    with prepared(options.seed) as place:
        doses = dict(DOSES[options.doses])
        skipped = dict.fromkeys(("disk full", "disk read-only"), place.disk.missing) if place.disk.missing else {}
        for name in skipped:
            doses[name] = 0
        driver = Driver(place, options, log, roles=lambda role: True)
        driver.note(
            "start", seed=options.seed, command=sys.argv[1:], commit=commit(), machine=about(place.stack), times=TIMES
        )
        driver.start_track(arriving(driver))
        driver.start_track(nemesis("stores", driver, STORE_FAULTS, doses), after=4)
        driver.start_track(nemesis("hosts", driver, HOST_FAULTS, doses), after=6)

        def without_dose() -> list[str]:
            missing = [] if options.doses in ONLY else not_killed(ROLES, driver.kills)
            steps = [f"{point}: no kill" for point in missing]
            faults = [f"{n}: {driver.doses[n]} of {dose}" for n, dose in doses.items() if driver.doses[n] < dose]
            least = LEAST if options.doses in ("full", "long") else {}
            reached = {"recordings": driver.planted.items, "kills": driver.kills.total()}
            few = [f"{reached[what]} of {number} {what}" for what, number in least.items() if reached[what] < number]
            return steps + faults + few

        try:
            rested = driver.run(options.minutes, enough=lambda: not without_dose())
            wrong = [] if rested else ["it does not come to rest: something is left to be done, and nothing moves"]
            wrong += wrongs(driver.planted, place.stores)
        finally:
            for worker in driver.workers:
                driver.kill(worker, "the end")
        good = tell(driver, wrong, without_dose(), skipped)
        if not good:
            kept = log.with_suffix(".logs")
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            for said in place.directory.glob("*.log"):
                shutil.copy(said, kept)
            print(f"what the workers said: {kept}")
        return 0 if good else 1


def teeth(options: argparse.Namespace) -> int:
    """Break one atomic step after the other; 0 if the campaign fails each time, and not where nothing is broken."""
    from teeth import MUTANTS, bites

    log = (options.report / "teeth.jsonl").open("w")
    missed = 0
    with prepared(options.seed) as place:
        for role, mutant, hint in MUTANTS:
            name = f"{role} {mutant.__name__}"
            if options.teeth and not any(wanted in name for wanted in options.teeth):
                continue
            found = bites(place, options, role, mutant, hint)
            missed += bool(found) != (mutant.__name__ != "nothing")
            log.write(json.dumps({"step": name, "found": found}) + "\n")
            log.flush()
            print(f"{'noticed' if found else 'not noticed':12} {name}: {found[0][:150] if found else '-'}", flush=True)
    return min(missed, 1)


def tell(driver: Driver, wrong: list[str], undosed: list[str], skipped: dict[str, str]) -> bool:
    """The outcome, into the log and for a person. True if all is well."""
    required = os.environ.get("REQUIRE_ALL") == "1"
    good = not wrong and not driver.oddities and not undosed and not (skipped and required)
    driver.note(
        "verdict",
        good=good,
        wrong=wrong,
        odd=driver.oddities,
        without_dose=undosed,
        skipped=skipped,
        recordings=driver.planted.items,
        batches=len(driver.planted.archives) + len(driver.planted.files) // BATCH_FILES,
        kills=driver.kills,
        poisoned=driver.deaths.total(),
        faults=driver.doses,
        ends=driver.ends,
        anew=driver.anew,
        figures=driver.figures,
    )
    named = sum(count for name, count in driver.kills.items() if name.split()[-1] in ("before", "after"))
    print(f"\n{driver.planted.items} recordings, {driver.doses.total()} faults")
    print(f"{driver.kills.total()} kills, {named} of them at named steps")
    for what, values in sorted(driver.figures.items()):
        print(f"{what}: {len(values)} times, {sum(values) / len(values):.1f} on average, {max(values):.1f} at most")
    for title, lines in (("WRONG", wrong), ("ODD", driver.oddities), ("NO DOSE", undosed)):
        for line in lines:
            print(f"{title}: {line}")
    for name, reason in skipped.items():
        print(f"NOT RUN: {name}: {reason}")
    print(f"seed {driver.options.seed}: {'all is accounted for' if good else 'FAILED'}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=5, help="how long things go wrong; draining comes on top")
    parser.add_argument(
        "--doses",
        choices=DOSES,
        default="small",
        help="each fault once, a third of the table's, these and long outages, or only these, or only timed deaths",
    )
    parser.add_argument("--teeth", nargs="*", metavar="STEP", help="break these steps in turn (default: every one)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page of the logs that are named")
    parser.add_argument("logs", type=Path, nargs="*", help="raw logs, of runs and of --teeth")
    parser.add_argument("--report", type=Path, default=CHECKOUT / ".cache" / "chaos", help="directory of raw logs")
    options = parser.parse_args()
    if options.write:
        return 0 if write(options.write, options.logs) else 1
    options.stuck, options.items = STUCK_SECONDS, None
    print(f"seed {options.seed}", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    options.report.mkdir(parents=True, exist_ok=True)
    try:
        return run(options) if options.teeth is None else teeth(options)
    except KeyboardInterrupt:
        print(f"\nstopped; seed {options.seed}")
        return 130


def end(number: int, _: Any) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
