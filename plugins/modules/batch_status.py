#!/usr/bin/python
# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: batch_status
short_description: Look at the batches of lab.audio, wait for them, or fail if they are stuck
version_added: 0.1.0
description:
  - Reads how far the batches are, what the hosts and lists are doing, what was set aside, and what is stuck.
    It changes nothing.
  - With O(wait_for) it is a gate for upgrades and restarts, with O(fail_on) it is a check for alerts.
  - The numbers are those of the view C(batch_progress) and the function C(stuck_batches), which the ledger's migrations
    own, so they agree with C(lab-audio status). Redis adds the lists.
  - With Redis alone it tells total and processed of each batch that Redis knows, and the lists.
extends_documentation_fragment:
  - lab.audio._attributes
  - lab.audio._attributes.action_group
attributes:
  check_mode:
    support: full
    details: It never changes anything.
  diff_mode:
    support: none
    details: There is never a difference.
  idempotent:
    support: full
  async:
    support: full
  platform:
    support: full
    platforms: posix
options:
  batch_id:
    description: Only this batch, also if it has ended. Fails if nobody knows it.
    type: str
  stuck_after:
    description:
      - Seconds after which a batch is stuck. One that is open for so long is a warning, one without any progress for so
        long is critical.
    type: int
    default: 7200
  fail_on:
    description:
      - Fail if this is found. The result is returned all the same.
      - V(stuck) - a batch that the ledger knows is stuck by either rule. A job in Redis that it does not know is in
        RV(lists) only, until an unpack worker takes it.
      - V(dead_letters) - a recording, batch or payload was set aside and nobody has dealt with it.
      - V(no_workers) - no host was seen in the last two minutes with its models ready and without a pause.
    type: list
    elements: str
    choices: [stuck, dead_letters, no_workers]
    default: []
  wait_for:
    description:
      - Wait before looking, for at most O(timeout) seconds. Fails if it does not come to that.
      - V(idle) - no batch is open and no list holds a job. Needs both O(database_url) and O(redis_url).
      - V(complete) - the batch O(batch_id) is complete. A batch that failed ends the waiting.
    type: str
    choices: [idle, complete]
  timeout:
    description: Seconds to wait at most with O(wait_for).
    type: int
    default: 300
  database_url:
    description:
      - PostgreSQL, as C(postgresql://user:password@host/database).
      - Taken from E(DATABASE_URL) of the host, or from a file in O(credentials_directory), if not given.
    type: str
  redis_url:
    description:
      - Redis or Valkey, as C(redis://user:password@host:6379/0).
      - Taken from E(REDIS_URL) of the host, or from a file in O(credentials_directory), if not given.
    type: str
  credentials_directory:
    description:
      - Directory on the host with the files C(database_url) and C(redis_url), so that no secret is needed in a task.
      - Taken from E(CREDENTIALS_DIRECTORY) of the host if not given.
    type: path
requirements:
  - psycopg2 (for PostgreSQL)
  - redis >= 5.0 (the Python package, for Redis)
author:
  - The lab.audio maintainers (@lab-audio)
"""

EXAMPLES = r"""
- name: Look at everything, with DATABASE_URL and REDIS_URL from the environment
  lab.audio.batch_status:
  register: status

- name: Before an upgrade, wait until nothing is at work
  lab.audio.batch_status:
    credentials_directory: /etc/lab-audio/credentials
    wait_for: idle
    timeout: 3600

- name: Wait for one batch
  lab.audio.batch_status:
    batch_id: 20250622-143052-a1b2c3
    wait_for: complete

- name: A check for a monitoring system
  lab.audio.batch_status:
    stuck_after: 7200
    fail_on: [stuck, dead_letters, no_workers]
"""

RETURN = r"""
batches:
  description: Open batches, oldest first; or the one that was asked for.
  returned: always
  type: list
  elements: dict
  contains:
    batch_id:
      description: Name of the batch.
      type: str
      sample: 20250622-143052-a1b2c3
    state:
      description: V(minted), V(uploaded), V(unpacking), V(ready), V(complete) or V(failed). Redis alone does not know.
      type: str
      sample: ready
    host:
      description: Host whose scratch holds it.
      type: str
      sample: gpu-1
    total:
      description: Recordings in it; what its job promised until they are known.
      type: int
      sample: 847
    processed:
      description: Recordings that are done or dead.
      type: int
      sample: 400
    dead:
      description: Recordings that were set aside.
      type: int
      sample: 1
    percent:
      description: Processed of total.
      type: float
      sample: 47.2
    rate:
      description: Recordings a second since it was unpacked.
      type: float
      sample: 1.6
    eta_seconds:
      description: Until its end, at that rate.
      type: float
      sample: 279.4
    age_seconds:
      description: Since it was uploaded or last tried again, or without that since it was minted.
      type: float
      sample: 410.2
    idle_seconds:
      description: Since its last progress, which is a change of state or a recording that was settled.
      type: float
      sample: 0.7
    flags:
      description: What was odd about it and did no harm.
      type: list
      elements: str
      sample: []
    reason:
      description: Why it failed.
      type: str
      sample: archive missing
totals:
  description: Sums over RV(batches).
  returned: always
  type: dict
  sample: {"batches": 2, "total": 1200, "processed": 640, "dead": 1, "percent": 53.3}
hosts:
  description:
    - Hosts that take part, with the seconds since they, and their models, were seen; and those that are lost and not
      forgotten, whose batches others do.
  returned: with PostgreSQL
  type: list
  elements: dict
  sample: [{"host": "gpu-1", "paused": false, "lost": false, "seen_seconds": 4.1, "gpu_seen_seconds": 9.8}]
lists:
  description:
    - Each list with its depth, and for how many seconds the batch of its oldest job has been uploaded or ready.
  returned: with Redis
  type: list
  elements: dict
  sample: [{"name": "unpack", "depth": 3, "oldest_seconds": 61.5}]
dead_letters:
  description: What was set aside and waits for somebody; null where the store that knows was not asked.
  returned: always
  type: dict
  sample: {"recordings": 1, "batches": 0, "payloads": 0}
stuck:
  description: Batches that are stuck, with the reason and what they wait for.
  returned: with PostgreSQL
  type: list
  elements: dict
  sample:
    - batch_id: 20250622-143052-a1b2c3
      severity: critical
      reason: no progress for 9120 s; it is ready and waits for the GPU worker on gpu-1, seen 9133 s ago
waited_seconds:
  description: How long it waited.
  returned: with O(wait_for)
  type: float
  sample: 12.0
"""

import re
import time
import traceback
import typing as t
from datetime import datetime, timezone
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule, env_fallback, missing_required_lib
from ansible_collections.lab.audio.plugins.module_utils._credentials import credential

try:
    import psycopg2
    import psycopg2.extras

    PSYCOPG2_ERROR = None
except ImportError:
    PSYCOPG2_ERROR = traceback.format_exc()

try:
    import redis

    REDIS_ERROR = None
except ImportError:
    REDIS_ERROR = traceback.format_exc()

BATCH_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
TRANSFERRED_AT = re.compile(r'"transferred_at":\s*"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8})Z"')
POLL_SECONDS = 1.0
ANSWER_SECONDS = 15
SEEN_SECONDS = 120
EVERYWHERE = "*"  # the row of hosts that stands for a pause of all

Row = dict[str, t.Any]

BATCHES = """
SELECT batch_id, state, host, total, processed, dead, percent, rate, eta_seconds, age_seconds, idle_seconds, flags,
    reason
FROM batch_progress WHERE {which} ORDER BY age_seconds DESC NULLS LAST, batch_id
"""
HOSTS = """
SELECT host, paused OR EXISTS (SELECT FROM hosts WHERE host = %(all)s AND paused) AS paused, seen_at IS NULL AS lost,
    extract(epoch FROM now() - coalesce(seen_at, silent_since))::float AS seen_seconds,
    extract(epoch FROM now() - gpu_seen_at)::float AS gpu_seen_seconds
FROM hosts WHERE host <> %(all)s AND coalesce(seen_at, silent_since) IS NOT NULL ORDER BY host
"""
STUCK = "SELECT * FROM stuck_batches(make_interval(secs => %(after)s))"
DEAD = """
SELECT (SELECT count(*) FROM audio_files WHERE state = 'dead' AND dropped_at IS NULL) AS recordings,
    (SELECT count(*) FROM batches WHERE state = 'failed' AND dropped_at IS NULL) AS batches
"""
WAITING = """
SELECT batch_id,
    extract(epoch FROM now() - CASE state WHEN 'ready' THEN ready_at ELSE uploaded_at END)::float AS seconds
FROM batches WHERE batch_id = ANY(%(ids)s)
"""


class Missed(Exception):
    """A store does not answer, or not as ours would; the message says what to do."""


class Ledger:
    """PostgreSQL, read only."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.where = f"PostgreSQL at {parts.hostname or 'local socket'}:{parts.port or 5432}{parts.path}"
        try:
            self.connection = psycopg2.connect(
                url,
                connect_timeout=ANSWER_SECONDS,
                application_name="lab.audio.batch_status",
                options=f"-c default_transaction_read_only=on -c statement_timeout={ANSWER_SECONDS}s",
            )
            self.connection.autocommit = True
        except psycopg2.Error as error:
            raise Missed(f"{self.where} cannot be reached: {one_line(error)}") from error

    def rows(self, query: str, **values: t.Any) -> list[Row]:
        try:
            with self.connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
                cursor.execute(query, values)
                return [rounded(row) for row in cursor.fetchall()]
        except (psycopg2.errors.UndefinedTable, psycopg2.errors.UndefinedFunction, psycopg2.errors.UndefinedColumn):
            raise Missed(f"{self.where} has not the tables of this release: run `lab-audio migrate`") from None
        except psycopg2.Error as error:
            raise Missed(f"{self.where}: {one_line(error)}") from error

    def batches(self, batch_id: str | None) -> list[Row]:
        """Open batches, or the one that is named."""
        return self.rows(BATCHES.format(which="open" if batch_id is None else "batch_id = %(id)s"), id=batch_id)


class Lists:
    """Redis, read only."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.where = f"Redis at {parts.hostname or parts.path}:{parts.port or 6379}"
        try:
            self.client = redis.Redis.from_url(
                url,
                decode_responses=True,
                encoding_errors="surrogateescape",
                socket_connect_timeout=ANSWER_SECONDS,
                socket_timeout=ANSWER_SECONDS,
            )
        except (ValueError, TypeError) as error:
            raise Missed(f"redis_url: {one_line(error)}") from error

    def ask(self, question: t.Callable[[t.Any], list[Row]]) -> list[Row]:
        try:
            return question(self.client)
        except redis.RedisError as error:
            raise Missed(f"{self.where} cannot be asked: {one_line(error)}") from error

    def lists(self) -> list[Row]:
        """Each list with its depth and its oldest job; `dead` is the last."""
        return self.ask(lists_of)

    def batches(self, batch_id: str | None) -> list[Row]:
        """Total and processed of each batch that Redis has been told of, or of the one that is named."""
        return self.ask(lambda client: counters_of(client, batch_id))


def lists_of(client: t.Any) -> list[Row]:
    names = ["unpack", "transcribe"]
    for pattern in ("transcribe:*", "processing:*"):
        names += sorted(set(client.scan_iter(match=pattern, count=1000)))  # SCAN may name one twice
    pipeline = client.pipeline(transaction=False)
    names.append("dead")
    for name in names:
        pipeline.llen(name).lindex(name, 0)
    answers = pipeline.execute()
    return [
        {"name": name, "depth": answers[2 * place], "oldest": answers[2 * place + 1]}
        for place, name in enumerate(names)
    ]


def counters_of(client: t.Any, batch_id: str | None) -> list[Row]:
    ids = [batch_id] if batch_id else sorted({n.split(":")[1] for n in client.scan_iter(match="batch:*:total")})
    found = []
    for one in ids:
        total, processed = client.mget(f"batch:{one}:total", f"batch:{one}:processed")
        if total is not None:
            try:
                done, of = int(processed or 0), int(total)
            except ValueError:
                raise Missed(f"batch:{one}:total or :processed in Redis is no number: delete both") from None
            found.append({"batch_id": one, "total": of, "processed": done, "percent": percent(done, of)})
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "batch_id": {"type": "str"},
            "stuck_after": {"type": "int", "default": 7200},
            "fail_on": {
                "type": "list",
                "elements": "str",
                "choices": ["stuck", "dead_letters", "no_workers"],
                "default": [],
            },
            "wait_for": {"type": "str", "choices": ["idle", "complete"]},
            "timeout": {"type": "int", "default": 300},
            "database_url": {"type": "str", "no_log": True, "fallback": (env_fallback, ["DATABASE_URL"])},
            "redis_url": {"type": "str", "no_log": True, "fallback": (env_fallback, ["REDIS_URL"])},
            "credentials_directory": {"type": "path", "fallback": (env_fallback, ["CREDENTIALS_DIRECTORY"])},
        },
        required_if=[("wait_for", "complete", ["batch_id"])],
        supports_check_mode=True,
    )
    batch_id, fail_on = module.params["batch_id"], module.params["fail_on"]
    if batch_id is not None and not BATCH_ID.fullmatch(batch_id):
        module.fail_json(msg=f"batch_id {batch_id!r} is not YYYYMMDD-HHMMSS-xxxxxx")
    if module.params["stuck_after"] < 1 or module.params["timeout"] < 0:
        module.fail_json(msg="stuck_after is at least 1, timeout at least 0 seconds")
    database_url, redis_url = (credential(module, name, name) for name in ("database_url", "redis_url"))
    check_usable(module, database_url, redis_url)
    result: Row = {}
    try:
        ledger = Ledger(database_url) if database_url else None
        lists = Lists(redis_url) if redis_url else None
        if module.params["wait_for"]:
            result["waited_seconds"] = wait(module, ledger, lists)
        result.update(look(ledger, lists, batch_id, module.params["stuck_after"]))
    except Missed as error:
        module.fail_json(msg=str(error))
    found = findings(result, fail_on)
    if found:
        module.fail_json(msg="; ".join(found), **result)
    module.exit_json(changed=False, **result)


def check_usable(module: AnsibleModule, database_url: str | None, redis_url: str | None) -> None:
    """Fail, saying what to give, unless there is what the options need."""
    if not database_url and not redis_url:
        module.fail_json(
            msg="neither PostgreSQL nor Redis is given: set database_url and redis_url, or DATABASE_URL and REDIS_URL"
            " in the environment of the host, or credentials_directory"
        )
    wait_for = module.params["wait_for"]
    needs = [f"fail_on={name}" for name in module.params["fail_on"]]
    needs += [f"wait_for={wait_for}"] if wait_for else []
    if needs and not database_url:
        module.fail_json(msg=f"{', '.join(needs)} needs PostgreSQL: set database_url")
    if wait_for == "idle" and not redis_url:
        module.fail_json(msg="wait_for=idle needs Redis, which holds the jobs: set redis_url")
    if "dead_letters" in module.params["fail_on"] and not redis_url:
        module.fail_json(msg="fail_on=dead_letters needs Redis, too, which holds the payloads: set redis_url")
    if database_url and not is_url(database_url, ("postgresql", "postgres")):
        module.fail_json(msg="database_url must be a URL postgresql://...")
    if redis_url and not is_url(redis_url, ("redis", "rediss", "unix")):
        module.fail_json(msg="redis_url must be a URL redis://..., rediss://... or unix://...")
    # Libraries quote what they do not understand, and it may be this.
    passwords = [urlsplit(url).password for url in (database_url, redis_url) if url]
    module.no_log_values.update(filter(None, passwords))
    if database_url and PSYCOPG2_ERROR:
        module.fail_json(msg=missing_required_lib("psycopg2"), exception=PSYCOPG2_ERROR)
    if redis_url and REDIS_ERROR:
        module.fail_json(msg=missing_required_lib("redis"), exception=REDIS_ERROR)


def is_url(url: str, schemes: t.Sequence[str]) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and parts.port != 0
    except ValueError:
        return False


def wait(module: AnsibleModule, ledger: Ledger, lists: Lists | None) -> float:
    """Wait for what is wanted; fails, with what was seen last, if it does not come. Returns for how many seconds."""
    wanted, timeout, batch_id = module.params["wait_for"], module.params["timeout"], module.params["batch_id"]
    began = time.monotonic()
    while True:
        if wanted == "complete":
            there, seen = is_complete(ledger, batch_id)
        else:
            there, seen = is_idle(ledger, lists)
            if there:  # a job may have moved as the lists were looked at
                there, seen = is_idle(ledger, lists)
        waited = time.monotonic() - began
        if there:
            return round(waited, 1)
        if waited >= timeout:
            module.fail_json(msg=f"not {wanted} after {timeout} s: {seen}")
        time.sleep(min(POLL_SECONDS, timeout - waited))


def is_complete(ledger: Ledger, batch_id: str) -> tuple[bool, str]:
    """Whether a batch is complete, and what it is. One that nobody knows may still come."""
    for batch in ledger.batches(batch_id):
        if batch["state"] == "failed":
            raise Missed(f"batch {batch_id} failed: {batch['reason']}")
        return batch[
            "state"
        ] == "complete", f"it is {batch['state']}, {batch['processed']} of {batch['total']} processed"
    return False, "the ledger does not know it"


def is_idle(ledger: Ledger, lists: Lists) -> tuple[bool, str]:
    """Whether nothing is at work, and what is."""
    jobs = [f"{one['depth']} in {one['name']}" for one in lists.lists()[:-1] if one["depth"]]
    batches = len(ledger.batches(None))  # after the jobs, which are entered here before they leave a list
    return not batches and not jobs, f"{batches} batches are open; jobs: {', '.join(jobs) or 'none'}"


def look(ledger: Ledger | None, lists: Lists | None, batch_id: str | None, stuck_after: int) -> Row:
    """Everything there is to see, as the module returns it. Raises Missed for a batch that nobody knows."""
    first = ledger or lists
    batches = first.batches(batch_id)
    if batch_id is not None and not batches:
        raise Missed(f"batch {batch_id} is unknown to {first.where}")
    dead: Row = {"recordings": None, "batches": None, "payloads": None}
    result: Row = {"batches": batches, "totals": totals(batches), "dead_letters": dead}
    if ledger:
        dead.update(ledger.rows(DEAD)[0])
        result["hosts"] = ledger.rows(HOSTS, all=EVERYWHERE)
        result["stuck"] = [s for s in ledger.rows(STUCK, after=stuck_after) if batch_id in (None, s["batch_id"])]
    if lists:
        found = lists.lists()
        dead["payloads"] = found[-1]["depth"]
        ids = [match.group() for match in (BATCH_ID.search(one["oldest"] or "") for one in found) if match]
        waiting = {row["batch_id"]: row["seconds"] for row in ledger.rows(WAITING, ids=ids)} if ledger else {}
        result["lists"] = [
            {"name": one["name"], "depth": one["depth"], "oldest_seconds": waited_seconds(one["oldest"], waiting)}
            for one in found
        ]
    return result


def waited_seconds(job: str | None, waiting: t.Mapping[str, float]) -> float | None:
    """For how long a job waits: by the ledger, else since it says that its archive was transferred."""
    batch = BATCH_ID.search(job or "")
    if batch and waiting.get(batch.group()) is not None:
        return waiting[batch.group()]
    said = TRANSFERRED_AT.search(job or "")
    try:
        at = datetime.strptime(said.group(1), "%Y-%m-%dT%H:%M:%S") if said else None
    except ValueError:
        return None
    return round((datetime.now(timezone.utc) - at.replace(tzinfo=timezone.utc)).total_seconds(), 3) if at else None


def totals(batches: t.Sequence[Row]) -> Row:
    total, processed = (sum(batch[name] for batch in batches) for name in ("total", "processed"))
    dead = sum(batch.get("dead", 0) for batch in batches)
    return {
        "batches": len(batches),
        "total": total,
        "processed": processed,
        "dead": dead,
        "percent": percent(processed, total),
    }


def percent(processed: int, total: int) -> float | None:
    return round(100.0 * processed / total, 1) if total else None


def findings(result: Row, fail_on: t.Sequence[str]) -> list[str]:
    """What was found of that on which the module is to fail, in words."""
    found = []
    if "stuck" in fail_on:
        found += [f"batch {one['batch_id']} is stuck ({one['severity']}): {one['reason']}" for one in result["stuck"]]
    if "dead_letters" in fail_on and any(result["dead_letters"].values()):
        some = ", ".join(f"{count} {what}" for what, count in result["dead_letters"].items() if count)
        found.append(f"dead letters: {some}; look at them with `lab-audio dead list`")
    if "no_workers" in fail_on and not any(map(works, result["hosts"])):
        found.append(f"no host works: {'; '.join(map(in_words, result['hosts'])) or 'none takes part'}")
    return found


def works(host: Row) -> bool:
    seen = (host["seen_seconds"], host["gpu_seen_seconds"])
    return not host["paused"] and not host["lost"] and all(one is not None and one < SEEN_SECONDS for one in seen)


def in_words(host: Row) -> str:
    gpu = "never" if host["gpu_seen_seconds"] is None else f"{host['gpu_seen_seconds']:.0f} s ago"
    also = "is paused, " * host["paused"] + "is lost, " * host["lost"]
    return f"{host['host']} {also}was seen {host['seen_seconds']:.0f} s ago, with its models ready {gpu}"


def rounded(row: t.Mapping[str, t.Any]) -> Row:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
