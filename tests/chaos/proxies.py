"""Proxies before the three stores, which break what passes on demand: bytes to PostgreSQL and Redis, requests to S3."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import logging
import os
import random
import signal
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

BYTES_FAULTS = ("reset", "silent", "slow", "truncated")
S3_FAULTS = (*BYTES_FAULTS, "error", "ghost")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "trailer", "upgrade"}
ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>injected</Message></Error>'


class Cut(Exception):
    """The connection is to break."""


class Line:
    """The way to one store, and what is wrong with it now. `rate`: the share of what passes that is hit."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.mode, self.rate = "", 0.0
        self.over = asyncio.Event()
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.open: set[asyncio.StreamWriter] = set()

    def set(self, mode: str, rate: float) -> None:
        self.over.set()  # who was kept waiting is cut off
        self.over = asyncio.Event()
        self.mode, self.rate = mode, rate
        if mode == "away":
            for writer in self.open:
                writer.transport.abort()

    def hit(self) -> str:
        """The fault that this block or request meets; counted."""
        self.counts["passed"] += 1
        if not self.mode or self.random.random() >= self.rate:
            return ""
        self.counts[self.mode] += 1
        return self.mode

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection to a store whose protocol is not looked into."""
        self.open.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            if self.mode == "away":
                raise Cut
            answers, there = await asyncio.open_connection("127.0.0.1", self.port)
            halves = [
                asyncio.ensure_future(self.pump(reader, there, reply=False)),
                asyncio.ensure_future(self.pump(answers, writer, reply=True)),
            ]
            _, waiting = await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
            for half in waiting:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)
        except (OSError, Cut):
            pass
        finally:
            self.open.discard(writer)
            for end in (writer, there):
                if end is not None:
                    end.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reply: bool) -> None:
        while block := await reader.read(1 << 16):
            fault = self.hit()
            if fault == "slow":
                await asyncio.sleep(self.random.uniform(0.05, 0.5))
            elif fault == "silent":
                await self.over.wait()
                raise Cut
            elif fault == "truncated" and reply:
                writer.write(block[: len(block) // 2])
                await writer.drain()
                raise Cut
            elif fault in ("reset", "truncated", "away"):
                raise Cut
            writer.write(block)
            await writer.drain()


class S3Line(Line):
    """The way to the object store, by requests."""

    session: ClientSession

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = self.hit()
        if fault == "away":
            return self.cut(request)
        if fault == "silent":
            await self.over.wait()
            return self.cut(request)
        if fault == "slow":
            await asyncio.sleep(self.random.uniform(0.2, 1.5))
        if fault == "error":
            status, code = self.random.choice([(500, "InternalError"), (503, "SlowDown"), (502, "BadGateway")])
            return web.Response(status=status, text=ERROR.format(code), content_type="application/xml")
        if fault == "ghost" and (pretended := self.ghost(request, body)) is not None:
            return pretended
        late = self.random.random() < 0.5  # the request takes effect, the answer is lost
        if fault == "reset" and not late:
            return self.cut(request)
        if fault == "truncated" and body and not late:
            with contextlib.suppress(Exception):
                await self.pass_on(request, half(body), len(body))
            return self.cut(request)
        try:
            status, headers, content = await self.pass_on(request, body, len(body))
        except (ClientError, OSError):
            return self.cut(request)
        if fault == "reset":
            return self.cut(request)
        if fault == "truncated" and len(content) > 1:
            answer = web.StreamResponse(status=status, headers=headers)
            answer.content_length = len(content)
            await answer.prepare(request)
            await answer.write(content[: len(content) // 2])
            return self.cut(request, answer)
        if request.method == "HEAD":
            answer = web.StreamResponse(status=status, headers=headers)
            await answer.prepare(request)
            return answer
        return web.Response(status=status, headers=headers, body=content)

    def cut(self, request: web.Request, answer: web.StreamResponse | None = None) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return answer or web.Response(status=500)

    def ghost(self, request: web.Request, body: bytes) -> web.Response | None:
        """Success without effect, as a broken gateway says it; None where that cannot be."""
        if request.method == "DELETE":
            return web.Response(status=204)
        if request.method == "PUT":
            return web.Response(status=200)
        if request.method == "POST" and "uploadId" in request.query:
            if self.random.random() < 0.5:
                return web.Response(text=ERROR.format("InternalError"), content_type="application/xml")
            tag = hashlib.md5(body).hexdigest()
            done = f'<CompleteMultipartUploadResult><ETag>"{tag}-3"</ETag></CompleteMultipartUploadResult>'
            return web.Response(text=done, content_type="application/xml")
        return None

    async def pass_on(self, request: web.Request, body: Any, size: int) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        if size:
            headers["Content-Length"] = str(size)
        async with self.session.request(
            request.method,
            URL(f"http://127.0.0.1:{self.port}{request.raw_path}", encoded=True),
            headers=headers,
            data=body if size or request.method in ("PUT", "POST") else None,
            skip_auto_headers=("Content-Type", "User-Agent", "Accept", "Accept-Encoding"),
            allow_redirects=False,
        ) as answer:
            content = await answer.read()
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
            return answer.status, kept, content


async def half(body: bytes) -> Any:
    yield body[: len(body) // 2]
    raise Cut


class Proxies:
    """The proxies in a process of their own. `ports`: of the stores, by `s3`, `redis`, `postgres`; `at`: their own."""

    def __init__(self, ports: Mapping[str, int], seed: int) -> None:
        sockets = {}
        for name in ports:
            sockets[name] = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.at = {name: server.getsockname()[1] for name, server in sockets.items()}
        ours, theirs = socket.socketpair()
        me = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
                if os.getppid() == me:
                    os.setsid()
                    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                        signal.signal(number, signal.SIG_DFL)
                    ours.close()
                    logging.disable()  # broken connections are what this is for
                    asyncio.run(_serve(sockets, ports, theirs, seed))
            finally:
                os._exit(1)
        theirs.close()
        for server in sockets.values():
            server.close()
        self._control = ours.makefile("rwb")

    def set(self, store: str, mode: str = "", rate: float = 1.0) -> dict[str, int]:
        """Begin a fault (or none) on the way to a store. Returns what has passed and been hit there so far."""
        self._control.write(json.dumps([store, mode, rate]).encode() + b"\n")
        self._control.flush()
        counts: dict[str, int] = json.loads(self._control.readline())
        return counts

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


async def _serve(
    sockets: Mapping[str, socket.socket], ports: Mapping[str, int], control: socket.socket, seed: int
) -> None:
    lines: dict[str, Line] = {}
    for number, (name, port) in enumerate(ports.items()):
        if name == "s3":
            lines[name] = s3 = S3Line(port, seed + number)
            s3.session = ClientSession(
                timeout=ClientTimeout(total=60), auto_decompress=False, connector=TCPConnector(limit=0)
            )
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{tail:.*}", s3.handle)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.SockSite(runner, sockets[name]).start()
        else:
            lines[name] = Line(port, seed + number)
            await asyncio.start_server(lines[name].serve, sock=sockets[name])
    reader, writer = await asyncio.open_connection(sock=control)
    while order := await reader.readline():
        store, mode, rate = json.loads(order)
        lines[store].set(mode, rate)
        writer.write(json.dumps(lines[store].counts).encode() + b"\n")
        await writer.drain()


def port_of(url: str) -> int:
    return urlsplit(url).port or 0
