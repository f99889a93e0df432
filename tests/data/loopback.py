"""A server on loopback in a thread of its own; what it answers is a subclass's."""

import asyncio
import ssl
import threading
from contextlib import suppress


class Loopback:
    """Serves from when it is made until `stop`; `port` is where."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        # By strong reference: what waits for another connection while its own client has hung up is held by nothing else, and may be collected.
        self._answering: set[asyncio.Task[None] | None] = set()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection."""
        raise NotImplementedError

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        self._loop.close()

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._stopping = asyncio.Event()
            server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=self.tls, backlog=1024)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await self._stopping.wait()
            # A server that closes loses the socket of what it has accepted and not connected yet: no more come in first.
            self._loop.remove_reader(server.sockets[0].fileno())
            for _ in range(4):  # accepted, connected, answered: who is ended before its first turn closes nothing
                await asyncio.sleep(0)
            server.close()
            while answers := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in answers:
                    task.cancel()
                await asyncio.gather(*answers, return_exceptions=True)
                await asyncio.sleep(0)  # closed transports let go of their sockets

        self._loop.set_exception_handler(lambda *_: None)  # clients that hang up
        self._loop.run_until_complete(serve())

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._answering.add(task := asyncio.current_task())
        try:
            await self.answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            self._answering.discard(task)
