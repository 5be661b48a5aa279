"""Ledger and queues against a model in plain Python: two hosts, batches, kills and doubled jobs, in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab_audio import ledger, queues
from lab_audio.contracts import Result, item_of, processing_list
from lab_audio.errors import Permanent
from lab_audio.jobs import parse_transcribe_job, parse_unpack_job
from lab_audio.ledger import Archive, NewItem, Refused
from lab_audio.workers.unpack_worker import transcribe_jobs

from world import BATCH, ROOM, World, fake_classify, fake_transcribe, register

STEPS = ["unpack_step"] * 6 + ["gpu_step"] * 9 + ["kill", "double", "lose_scratch", "tidy", "upload", "retry"]
ACTIONS = st.tuples(st.sampled_from(STEPS), st.sampled_from(["h1", "h2"]), st.integers(0, 11))
ARCHIVE = Archive("0" * 64, 1, None)


class Protocol:
    """Steps are taken by hand, one at a time, so that a kill may fall between any two."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.reset()
        self.batches: dict[str, dict[str, Any]] = {}
        self.items: dict[tuple[str, str], str] = {}
        self.unpacking: dict[str, str] = {}
        self.working: dict[str, tuple[str, Any]] = {}
        self.inboxes: dict[tuple[str, str], queues.Inbox] = {}
        for host in ("h1", "h2"):
            register(self.world.engine, host, host)
            ledger.beat(self.world.engine, host, gpu=True)
            self.open("unpack", host)
            self.open("gpu", host)
        self.upload("h1", 2)
        self.upload("h1", 3)

    def open(self, kind: str, host: str) -> None:
        source = "unpack" if kind == "unpack" else f"transcribe:{host}"
        self.inboxes[kind, host] = queues.Inbox(self.world.client, source, processing_list(host, kind, 0))

    def upload(self, host: str, chance: int) -> None:
        """Another program's batch of up to three recordings."""
        if len(self.batches) == 5:
            return
        members = chance % 4
        batch_id = BATCH.format(len(self.batches))
        names = [f"{n}.mp3" for n in range(members)]
        job = self.world.job(batch_id, members)
        ledger.adopt(self.world.engine, batch_id, job, ARCHIVE)
        queues.push(self.world.client, "unpack", job)
        self.batches[batch_id] = {"state": "uploaded", "host": None, "names": names, "job": job}

    def unpack_step(self, host: str, chance: int) -> None:
        """What the unpack slot does next: take, seal or publish."""
        job = self.unpacking.get(host)
        if job is None:
            self.take(host)
        elif self.batches[parse_unpack_job(job).batch_id]["state"] == "unpacking":
            self.seal(host, bad=chance == 0)
        else:
            self.publish(host)

    def gpu_step(self, host: str, chance: int) -> None:
        """What the GPU slot does next: begin or end."""
        if host in self.working:
            ending = ("finish", "finish", "bury", "hand back")[chance % 4]
            self.end(host, ending, acknowledge=chance >= 4)
        else:
            self.begin(host)

    def take(self, host: str) -> None:
        if host in self.unpacking:
            return
        inbox = self.inboxes["unpack", host]
        job = inbox.claim(0)
        if job is None:
            return
        batch_id = parse_unpack_job(job).batch_id
        batch = self.batches[batch_id]
        granted = batch["state"] == "uploaded" or (batch["state"], batch["host"]) == ("unpacking", host)
        taken = ledger.take(self.world.engine, batch_id, host, ROOM)
        assert isinstance(taken, Refused) is not granted
        if granted:
            assert not isinstance(taken, Refused)
            settled = {item_of(m) for (b, m), state in self.items.items() if b == batch_id and state != "pending"}
            assert taken.settled == settled
            batch.update(state="unpacking", host=host)
            self.unpacking[host] = job
        else:
            self.publish_now(host, job)

    def seal(self, host: str, *, bad: bool) -> None:
        if host not in self.unpacking:
            return
        batch_id = parse_unpack_job(self.unpacking[host]).batch_id
        batch = self.batches[batch_id]
        rows = [
            NewItem(name, item_of(name), name, reason="bad" if bad and name == "0.mp3" else None)
            for name in batch["names"]
        ]
        state = ledger.seal(self.world.engine, batch_id, host, rows, ARCHIVE, [])
        if (batch["state"], batch["host"]) != ("unpacking", host):
            assert state is None
            return
        for row in rows:
            if self.items.get((batch_id, row.member), "pending") == "pending":
                self.items[batch_id, row.member] = "dead" if row.reason else "pending"
        pending = any(self.items[batch_id, name] == "pending" for name in batch["names"])
        batch["state"] = "ready" if pending else "complete"
        assert state == batch["state"]

    def publish(self, host: str) -> None:
        job = self.unpacking.get(host)
        if job is not None and self.batches[parse_unpack_job(job).batch_id]["state"] != "unpacking":
            del self.unpacking[host]
            self.publish_now(host, job)

    def publish_now(self, host: str, job: str) -> None:
        batch_id = parse_unpack_job(job).batch_id
        inbox = self.inboxes["unpack", host]
        batch = self.batches[batch_id]
        with ledger.publishing(self.world.engine, batch_id, host) as told:
            assert (told is not None) == ((batch["state"], batch["host"]) == ("ready", host))
            if told is None:
                inbox.drop(job)
            else:
                pending = [m for m in batch["names"] if self.items[batch_id, m] == "pending"]
                assert told.pending == [(item_of(m), m) for m in pending]
                jobs = transcribe_jobs(self.world.scratch(host), batch_id, told.pending)
                inbox.publish(job, host, batch_id, told.total, told.processed, jobs)

    def begin(self, host: str) -> None:
        if host in self.working:
            return
        job = self.inboxes["gpu", host].claim(0)
        if job is None:
            return
        wanted = parse_transcribe_job(job)
        item = ledger.find_item(self.world.engine, wanted.batch_id, wanted.item)
        assert item is not None
        attempts = ledger.begin(self.world.engine, item.audio_id, host, item.attempts)
        batch = self.batches[item.batch_id]
        pending = self.items[item.batch_id, item.member] == "pending"
        assert (attempts is not None) == (pending and (batch["state"], batch["host"]) == ("ready", host))
        if attempts is None:
            self.inboxes["gpu", host].drop(job)
        else:
            self.working[host] = (job, item)

    def end(self, host: str, ending: str, *, acknowledge: bool) -> None:
        if host not in self.working:
            return
        job, item = self.working[host]
        inbox, engine = self.inboxes["gpu", host], self.world.engine
        place = (item.batch_id, item.member)
        if ending == "hand back":
            ledger.hand_back(engine, item.audio_id, host, item.attempts)
            inbox.move(job, inbox.source, "head")
            del self.working[host]
            return
        if ending == "finish":
            result = Result(fake_transcribe(b"x"), fake_classify(["x"])[0])
            settled = ledger.finish(engine, item.audio_id, f"processed/{item.date}/{item.audio_id}.opus", result)
            new, may = "done", True
        else:
            settled = ledger.bury(engine, item.audio_id, host, "bad")
            batch = self.batches[item.batch_id]
            new, may = "dead", (batch["state"], batch["host"]) == ("ready", host)
        assert settled.changed == (may and self.items[place] == "pending")
        if settled.changed:
            self.items[place] = new
        assert settled.state == self.items[place]
        names = self.batches[item.batch_id]["names"]
        assert (settled.processed, settled.total) == (self.processed(item.batch_id), len(names))
        if settled.processed == settled.total and self.batches[item.batch_id]["state"] == "ready":
            self.batches[item.batch_id]["state"] = "complete"
        if settled.state == "pending":
            inbox.drop(job)
            del self.working[host]
            return
        if acknowledge:
            inbox.ack(job, item.batch_id, settled.processed)
            del self.working[host]

    def processed(self, batch_id: str) -> int:
        return sum(state != "pending" for (b, _), state in self.items.items() if b == batch_id)

    def kill(self, host: str, chance: int) -> None:
        """The process is gone with all it remembered; the next one has its slot."""
        kind = ("unpack", "gpu")[chance % 2]
        (self.unpacking if kind == "unpack" else self.working).pop(host, None)
        self.open(kind, host)

    def double(self, host: str, chance: int) -> None:
        for name in ("unpack", f"transcribe:{host}", processing_list(host, "gpu", 0)):
            job = self.world.client.lindex(name, 0)
            if job is not None:
                self.world.client.rpush("unpack" if name == "unpack" else f"transcribe:{host}", job)

    def lose_scratch(self, host: str, chance: int) -> None:
        """A batch goes back to be unpacked by anyone, while its jobs are still about."""
        for batch_id, batch in self.batches.items():
            if (batch["state"], batch["host"]) == ("ready", host):
                ledger.give_back(self.world.engine, batch_id, host)
                job = ledger.waiting_job(self.world.engine, batch_id)
                assert job == batch["job"]
                queues.push(self.world.client, "unpack", job)
                batch.update(state="uploaded", host=None)
                return

    def tidy(self, host: str, chance: int) -> None:
        for batch_id in ledger.leaving_batches(self.world.engine, host):
            assert self.batches[batch_id]["state"] == "complete"
            queues.forget_batch(self.world.client, batch_id)
            ledger.release(self.world.engine, batch_id, host)
            self.batches[batch_id]["host"] = None

    def retry(self, host: str, chance: int) -> None:
        """An operator has the dead recordings of each batch tried again."""
        for batch_id, batch in self.batches.items():
            dead = [place for place, state in self.items.items() if place[0] == batch_id and state == "dead"]
            ended = (batch["state"], batch["host"]) == ("complete", None)
            try:
                count = ledger.retry(self.world.engine, batch_id)
            except Permanent:
                assert batch["state"] != "uploaded" and not (ended and dead)
                continue
            assert count == len(dead)
            assert batch["state"] == "uploaded" or (ended and dead)
            self.items.update(dict.fromkeys(dead, "pending"))
            batch["state"] = "uploaded"
            queues.push(self.world.client, "unpack", batch["job"])

    def the_ledger_is_the_model(self) -> None:
        found = {b: (state, host) for b, state, host in self.world.rows("SELECT batch_id, state, host FROM batches")}
        assert found == {b: (batch["state"], batch["host"]) for b, batch in self.batches.items()}
        items = {(b, m): state for b, m, state in self.world.rows("SELECT batch_id, member, state FROM audio_files")}
        assert items == self.items
        done = sum(state == "done" for state in self.items.values())
        assert self.world.rows("SELECT count(*) FROM transcripts") == [(done,)]
        assert self.world.rows("SELECT count(*) FROM classifications") == [(done,)]

    def nothing_is_lost_in_redis(self) -> None:
        """Every batch that waits has its job; every pending item of a published batch has its own."""
        client = self.world.client
        jobs = {
            job for name in client.scan_iter("*") if client.type(name) == "list" for job in client.lrange(name, 0, -1)
        }
        published = {parse_unpack_job(job).batch_id for job in jobs if "s3_key" in job}
        for batch_id, batch in self.batches.items():
            if batch["state"] in ("uploaded", "unpacking"):
                assert batch["job"] in jobs
            elif batch["state"] == "ready" and batch_id not in published:
                pending = [m for m in batch["names"] if self.items[batch_id, m] == "pending"]
                for member in pending:
                    assert any(batch_id in job and item_of(member) in job for job in jobs)

    def end_well(self) -> None:
        """However it went, it can be brought to an end."""
        for host in ("h1", "h2"):
            self.kill(host, 0)
            self.kill(host, 1)
        for _ in range(200):
            for host in ("h1", "h2"):
                self.unpack_step(host, 1)
                self.gpu_step(host, 4)
                self.tidy(host, 0)
            if all((b["state"], b["host"]) == ("complete", None) for b in self.batches.values()):
                break
        self.the_ledger_is_the_model()
        assert set(self.items) == {(b, m) for b, batch in self.batches.items() for m in batch["names"]}
        assert "pending" not in self.items.values()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(ACTIONS, min_size=40, max_size=80))
def test_ledger_and_queues_behave_as_the_model(world: World, actions: list[tuple[str, str, int]]) -> None:
    protocol = Protocol(world)
    for step, host, chance in actions:
        getattr(protocol, step)(host, chance)
        protocol.the_ledger_is_the_model()
        protocol.nothing_is_lost_in_redis()
    protocol.end_well()
