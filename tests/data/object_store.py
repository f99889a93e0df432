"""An S3-compatible server on loopback in a process of its own, and a proxy before it that misbehaves as networks do."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.data.loopback import Loopback

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
SERVE = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the parent goes
"""


@contextmanager
def serve_s3() -> Iterator[int]:
    """Give the port of a server that is empty."""
    with subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


class Proxy(Loopback):
    """Passes requests on; when it is told to, answers some with 503 and cuts others in the middle of the answer."""

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.store: Any = None  # the way around
        self.reset()
        super().__init__()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head.decode("latin-1"))
        number = len(self.requests)
        await asyncio.sleep(self.delay_seconds)
        if self.busy_every and number % self.busy_every == 0:
            self.faults += 1
            writer.write(BUSY)
        else:
            there, to_there = await asyncio.open_connection("127.0.0.1", self.to_port)
            to_there.write(head.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n")
            try:
                answer = await there.read()
            finally:
                to_there.close()
            if self.cut_every and number % self.cut_every == 0:
                self.faults += 1
                answer = answer[:-len(answer) // 3]
            writer.write(answer)
        await writer.drain()

    def asked_for(self, name: str) -> int:
        """Return how many requests named a file."""
        return sum(name in head.partition("\r\n")[0] for head in self.requests)

    def reset(self) -> None:
        """Behave, and forget what was asked."""
        self.requests, self.faults, self.busy_every, self.cut_every, self.delay_seconds = [], 0, 0, 0, 0.0


def open_store(port: int) -> Any:
    """Return s3fs for a server; what it writes may be read by anyone, as by a web browser."""
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", s3_additional_kwargs={"ACL": "public-read"}, skip_instance_cache=True)
