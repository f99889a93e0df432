"""The tests' own server does not lose what it is answering."""

import asyncio
import gc
import socket
import threading

from tests.data.loopback import Loopback


def test_an_answer_that_waits_for_another_server_outlives_its_client_and_the_garbage_collector() -> None:
    hung_up, ended = threading.Event(), threading.Event()

    class Silent(Loopback):
        async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

    class Asks(Loopback):
        async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, to_there = await asyncio.open_connection("127.0.0.1", silent.port)
            try:
                await reader.read()
                hung_up.set()
                await there.read()
            finally:
                to_there.close()
                ended.set()

    silent = Silent()
    asks = Asks()
    socket.create_connection(("127.0.0.1", asks.port)).close()
    assert hung_up.wait(10)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), asks._loop).result(10)  # it waits for the other server now
    gc.collect()
    assert not ended.is_set()
    asks.stop()
    assert ended.is_set()
    silent.stop()


def test_a_server_that_stops_closes_what_it_has_only_just_let_in() -> None:
    class Reads(Loopback):
        async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

    for _ in range(20):
        server = Reads()
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        server.stop()
        for client in clients:
            client.close()
    gc.collect()  # pytest fails for a socket that is found open here
