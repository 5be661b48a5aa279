"""A proxy before an object store, for tests that damage what passes between a client and the store."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit


class Cut(Exception):
    """Raised by a proxy's hook to break the connection."""


class Proxy:
    """Plain HTTP on loopback before a store; `on_request`, `on_reply` get a block and return what goes on."""

    on_request: Callable[[bytes], bytes]
    on_reply: Callable[[bytes], bytes]

    def __init__(self, store: Any) -> None:
        self._target = urlsplit(store.endpoint)
        self._trust = ssl.create_default_context(cafile=store.ca_bundle) if store.ca_bundle else None
        self.on_request = self.on_reply = lambda block: block
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        serve = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(serve, self._loop).result(10)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._target.hostname, self._target.port, ssl=self._trust)
        halves = [
            asyncio.ensure_future(self._pass(reader, there[1], lambda block: self.on_request(block))),
            asyncio.ensure_future(self._pass(there[0], writer, lambda block: self.on_reply(block))),
        ]
        # asyncio would log the cancelling of what it started itself.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
        for half in halves:
            half.cancel()
        await asyncio.gather(*halves, return_exceptions=True)
        there[1].transport.abort()
        writer.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes]
    ) -> None:
        while block := await reader.read(1 << 16):
            writer.write(change(block))
            await writer.drain()
