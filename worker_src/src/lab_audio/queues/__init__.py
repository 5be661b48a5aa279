"""Delivery by Redis lists. Any entry may vanish or be doubled: the ledger decides, so it costs time, never a result."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lab_audio.config import HOST_NAME, QueueSettings
from lab_audio.contracts import (
    BATCH_ID,
    DEAD,
    TRANSCRIBE,
    UNPACK,
    archive_key,
    batch_key,
    processing_list,
    transcribe_list,
)
from lab_audio.errors import ConfigError, Retryable
from lab_audio.scratch import MAX_SLOTS

BATCH_FIELDS = ("total", "processed", "s3_key")


def open_queues(settings: QueueSettings) -> redis.Redis:
    """A client that never repeats a command by itself: BLMOVE repeated takes a second job and forgets the first."""
    return redis.Redis.from_url(
        settings.redis_url.get_secret_value(),
        decode_responses=True,
        encoding_errors="surrogateescape",  # any bytes may be pushed by anyone, and must reach `dead` as they are
        socket_connect_timeout=5,
        socket_timeout=30,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(NoBackoff(), 0),
    )


@contextmanager
def _translated(client: redis.Redis) -> Iterator[None]:
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise ConfigError(f"REDIS_URL: {_where(client)} refused: {error}") from None
    except redis.RedisError as error:
        raise Retryable(f"{_where(client)}: {error}", "Redis") from error


def check_answers(client: redis.Redis) -> None:
    """Raises ConfigError where Redis does not let us in, Retryable where it is away."""
    with _translated(client):
        client.ping()


def _where(client: redis.Redis) -> str:
    options = client.connection_pool.connection_kwargs
    return f"Redis at {options.get('path') or '{}:{}'.format(options.get('host'), options.get('port', 6379))}"


def _run(client: redis.Redis, script: str, keys: list[str], arguments: Iterable[str | int]) -> int:
    source = Path(__file__).with_name("lua").joinpath(f"{script}.lua").read_text()
    with _translated(client):
        return int(client.register_script(source)(keys=keys, args=list(arguments)))


class Inbox:
    """A slot's way to its jobs (CLAIM): its own processing list first, then the list that it serves.

    The own list is read again at the start and after every error: a job whose delivery was lost on the way lies there.
    """

    def __init__(self, client: redis.Redis, source: str, own: str) -> None:
        self.client = client
        self.source = source
        self.own = own
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._unsure = True

    def left(self) -> list[str]:
        """Jobs in the own list that were not claimed here: of a process that died, or lost on the way."""
        with _translated(self.client):
            return [str(job) for job in self.client.lrange(self.own, 0, -1) if job not in self._held]

    def claim(self, wait: int) -> str | None:
        """The next job, or None if none comes within `wait` seconds (0: do not wait)."""
        if self._unsure:
            left = self.left()
            if left:
                self._held.add(left[0])
                return left[0]
            self._unsure = False
        try:
            with _translated(self.client):
                job: Any
                if wait:
                    job = self.client.blmove(self.source, self.own, wait, "LEFT", "RIGHT")
                else:
                    job = self.client.lmove(self.source, self.own, "LEFT", "RIGHT")
        except Retryable:
            self._unsure = True
            raise
        if job is None:
            return None
        with self._lock:
            if job in self._held:  # a doubled job lies in the own list until its twin is acknowledged
                return None
            self._held.add(job)
        return str(job)

    def _settled(self, job: str, act: Callable[[], int]) -> int:
        with self._lock:
            answer = act()
            self._held.discard(job)
        return answer

    def ack(self, job: str, batch_id: str, processed: int) -> bool:
        """Drop a settled job and raise the batch's counter. True if that reached its total."""
        keys = [self.own, batch_key(batch_id, "total"), batch_key(batch_id, "processed")]
        return self._settled(job, lambda: _run(self.client, "ack", keys, [job, processed])) == 1

    def drop(self, job: str) -> None:
        """Forget a job that is of no use to anyone."""

        def act() -> int:
            with _translated(self.client):
                return int(self.client.lrem(self.own, 0, job))

        self._settled(job, act)

    def move(self, job: str, to: str, end: Literal["head", "tail"] = "tail") -> None:
        """Hand a job to another list, if it is still here."""
        self._settled(job, lambda: _run(self.client, "move", [self.own, to], [job, end]))

    def bury(self, job: str) -> None:
        """Set aside a payload that has no row in the ledger."""
        self.move(job, DEAD)

    def publish(self, job: str, host: str, batch_id: str, total: int, processed: int, pending: Iterable[str]) -> None:
        """Tell Redis of a ready batch: its keys, and each pending job that is not in flight; drops the unpack job."""

        def act() -> int:
            return publish(self.client, host, batch_id, total, processed, pending, job=job, own=self.own)

        self._settled(job, act)


def publish(
    client: redis.Redis,
    host: str,
    batch_id: str,
    total: int,
    processed: int,
    pending: Iterable[str],
    *,
    job: str = "",
    own: str = "",
) -> int:
    """PUBLISH (see `Inbox.publish`); without a job, the batch is only told again."""
    keys = [own or processing_list(host, UNPACK, 0)]
    keys += [batch_key(batch_id, field) for field in BATCH_FIELDS]
    keys += [transcribe_list(host), *(processing_list(host, "gpu", slot) for slot in range(MAX_SLOTS))]
    return _run(client, "publish", keys, [job, total, processed, archive_key(batch_id), *pending])


def is_queued(client: redis.Redis, on: str, job: str) -> bool:
    """Whether a job is on a list."""
    with _translated(client):
        return client.lpos(on, job) is not None


def push(client: redis.Redis, to: str, job: str) -> None:
    with _translated(client):
        client.rpush(to, job)


def forget_batch(client: redis.Redis, batch_id: str) -> None:
    """Delete a batch's three keys."""
    with _translated(client):
        client.delete(*(batch_key(batch_id, field) for field in BATCH_FIELDS))


def forget_host(client: redis.Redis, host: str) -> None:
    """Delete a lost host's transcribe jobs, and put what it had claimed of `unpack` and `transcribe` back there."""
    with _translated(client):
        for kind, to in (("unpack", UNPACK), ("route", TRANSCRIBE)):
            for slot in range(MAX_SLOTS):
                put_back(client, host, kind, slot, to)
        client.delete(transcribe_list(host), *(processing_list(host, "gpu", slot) for slot in range(MAX_SLOTS)))


def named_hosts(client: redis.Redis) -> set[str]:
    """Hosts that have a list; a name that no host can have is passed over."""
    with _translated(client):
        names = [str(name) for name in client.scan_iter(match=f"{TRANSCRIBE}:*", count=1000)]
        names += [str(name) for name in client.scan_iter(match="processing:*", count=1000)]
    return {host for host in (name.split(":")[1] for name in names) if re.fullmatch(HOST_NAME, host)}


def named_batches(client: redis.Redis) -> set[str]:
    """Batches that have keys."""
    with _translated(client):
        found = (str(name).split(":") for name in client.scan_iter(match="batch:*:*", count=1000))
        return {parts[1] for parts in found if BATCH_ID.fullmatch(parts[1])}


def is_published(client: redis.Redis, batch_id: str) -> bool:
    """Whether Redis has been told of a batch."""
    with _translated(client):
        return bool(client.exists(batch_key(batch_id, "total")))


def transcribe_jobs_of(client: redis.Redis, host: str) -> set[str]:
    """Every transcribe job of a host that waits or is in flight."""
    with _translated(client):
        pipeline = client.pipeline(transaction=True)  # a job may be moving from one list to the other
        for name in (transcribe_list(host), *(processing_list(host, "gpu", slot) for slot in range(MAX_SLOTS))):
            pipeline.lrange(name, 0, -1)
        return {str(job) for jobs in pipeline.execute() for job in jobs}


def forget_everything(client: redis.Redis) -> None:
    """Delete every key of ours but `dead`: the ledger knows it all."""
    with _translated(client):
        names = [UNPACK, TRANSCRIBE]
        for pattern in (f"{TRANSCRIBE}:*", "processing:*"):
            names += client.scan_iter(match=pattern, count=1000)
        client.delete(*names)
    for batch_id in named_batches(client):
        forget_batch(client, batch_id)


def queued_unpack_jobs(client: redis.Redis) -> list[str]:
    """Every unpack job that waits or is being worked on, on any host."""
    with _translated(client):
        jobs: list[Any] = list(client.lrange(UNPACK, 0, -1))
        for name in client.scan_iter(match="processing:*:unpack:*", count=1000):
            jobs += client.lrange(name, 0, -1)
    return jobs


def leftover_slots(client: redis.Redis, host: str, kind: str) -> list[int]:
    """Slots of this host whose processing list is not empty."""
    with _translated(client):
        pipeline = client.pipeline(transaction=False)
        for slot in range(MAX_SLOTS):
            pipeline.exists(processing_list(host, kind, slot))
        return [slot for slot, there in enumerate(pipeline.execute()) if there]


def put_back(client: redis.Redis, host: str, kind: str, slot: int, to: str) -> int:
    """Return a dead slot's jobs to the head of the list they came from. Its lock must be held. Returns how many."""
    moved = 0
    with _translated(client):
        while client.lmove(processing_list(host, kind, slot), to, "RIGHT", "LEFT"):
            moved += 1
    return moved


def dead_payloads(client: redis.Redis) -> list[str]:
    """Payloads that were set aside, oldest first, each once."""
    with _translated(client):
        return [str(payload) for payload in dict.fromkeys(client.lrange(DEAD, 0, -1))]


def count_dead(client: redis.Redis) -> int:
    """How many payloads were set aside."""
    with _translated(client):
        return int(client.llen(DEAD))


def revive(client: redis.Redis, payload: str, to: str) -> bool:
    """Move a payload that was set aside to a list. False if it is not there any more."""
    return _run(client, "move", [DEAD, to], [payload, "tail"]) == 1


def discard(client: redis.Redis, payload: str) -> None:
    """Forget a payload that was set aside."""
    with _translated(client):
        client.lrem(DEAD, 0, payload)


def lists(client: redis.Redis) -> dict[str, tuple[int, str | None]]:
    """Length and oldest payload of `unpack`, `transcribe`, each host's transcribe list, and `dead`.

    Anyone may name a key; what no host can have made is passed over.
    """
    with _translated(client):
        found = client.scan_iter(match=f"{TRANSCRIBE}:*", count=1000, _type="list")
        hosts = (name for name in found if re.fullmatch(HOST_NAME, name.removeprefix(f"{TRANSCRIBE}:")))
        names = [UNPACK, TRANSCRIBE, *sorted(hosts), DEAD]
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.llen(name)
            pipeline.lindex(name, 0)
        answers = pipeline.execute()
    return {name: (answers[2 * place], answers[2 * place + 1]) for place, name in enumerate(names)}


def refusal(client: redis.Redis) -> str | None:
    """Why Redis would take no job: its disk, its memory, another that it follows. None if it would."""
    with _translated(client):
        try:
            client.rpushx("lab_audio:none", "")  # refused as RPUSH is, and changes nothing where there is no such list
        except redis.ResponseError as error:
            return str(error)
    return None


@dataclass(frozen=True)
class Server:
    """`seconds`: of one answer. `persistent`: what it holds outlives a restart; `used` and `most`: bytes of memory.

    `rewrites`: its append-only file does not grow for ever.
    """

    seconds: float
    persistent: bool
    rewrites: bool
    policy: str
    used: int
    most: int


def server(client: redis.Redis) -> Server:
    """How Redis itself is. Raises ConfigError where its user may not ask for INFO."""
    with _translated(client):
        client.echo("")  # PING is refused where writes are
        began = time.monotonic()
        client.echo("")
        seconds = time.monotonic() - began
        info: dict[str, Any] = client.info()
    return Server(
        seconds,
        persistent=bool(info["aof_enabled"]),
        rewrites=info["aof_last_bgrewrite_status"] == "ok",
        policy=info["maxmemory_policy"],
        used=info["used_memory"],
        most=info["maxmemory"] or info["total_system_memory"],
    )
