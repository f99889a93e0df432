"""A web server on loopback that answers with prepared bytes, right or wrong ones."""

import asyncio
import ssl
import threading


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: image/png", "Connection: close", *headers])
    return head.encode("latin-1") + b"\r\n\r\n" + body


def redirect(target: str) -> bytes:
    return answer(b"", f"Location: {target}", status="302 Found")


NOT_FOUND = answer(b"gone", status="404 Not Found")


class Server:
    """Sends prepared bytes by path, in a thread of its own; to paths of `endless` what comes first, and what is repeated every so many seconds."""

    def __init__(self, answers: dict[str, bytes], endless: dict[str, tuple[bytes, bytes, float]] | None = None,
                 tls: ssl.SSLContext | None = None) -> None:
        self.answers, self.endless, self.tls, self.requests = answers, endless or {}, tls, []
        self.loop, started = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self.thread.start()
        assert started.wait(10)

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            self.stopping = asyncio.Event()
            server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=self.tls, backlog=512)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await self.stopping.wait()
            server.close()
            answers = asyncio.all_tasks() - {asyncio.current_task()}
            for task in answers:
                task.cancel()
            await asyncio.gather(*answers, return_exceptions=True)
            await asyncio.sleep(0)  # closed transports let go of their sockets

        self.loop.set_exception_handler(lambda *_: None)  # clients that hang up
        self.loop.run_until_complete(serve())

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.requests.append(head)
            path = head.split()[1].partition("?")[0]
            if path in self.endless:
                first, rest, pause = self.endless[path]
                writer.write(first)
                while not writer.is_closing():
                    writer.write(rest)
                    await writer.drain()
                    await asyncio.sleep(pause)
            else:
                writer.write(self.answers.get(path, NOT_FOUND))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()
            writer.close()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{path}"

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.stopping.set)
        self.thread.join(10)
        self.loop.close()
