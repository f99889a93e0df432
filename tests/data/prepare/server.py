"""A web server on loopback that answers with prepared bytes, right or wrong ones."""

import asyncio
import ssl

from tests.data.loopback import Loopback


def answer(body: bytes, *headers: str, status: str = "200 OK", kind: str = "image/png") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", f"Content-Type: {kind}", "Connection: close", *headers])
    return head.encode("latin-1") + b"\r\n\r\n" + body


def redirect(target: str) -> bytes:
    return answer(b"", f"Location: {target}", status="302 Found")


NOT_FOUND = answer(b"gone", status="404 Not Found")


class Server(Loopback):
    """Sends prepared bytes by path; to paths of `endless` what comes first, and what is repeated every so many seconds."""

    def __init__(self, answers: dict[str, bytes], endless: dict[str, tuple[bytes, bytes, float]] | None = None,
                 tls: ssl.SSLContext | None = None) -> None:
        self.answers, self.endless, self.requests = answers, endless or {}, []
        super().__init__(tls)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{path}"
