"""Files from URLs that strangers wrote: public addresses only, bounded in bytes and in time. The only door to aiohttp.

Every hop of a redirect goes through the same checks, and an address is checked where its socket is made: what was checked is what is connected
to, whatever a second look-up would say. No cookies, credentials, proxies or compressed bodies. `FetchError.reason` says in one word what
happened; what may pass is tried again as often as the caller says.
"""

import asyncio
import hashlib
import ipaddress
import itertools
import queue
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from flm_scale.errors import DataError

MAX_URL_LENGTH, MAX_REDIRECTS = 8192, 5
RETRY_SECONDS = 0.5  # before the second try; twice as long before each further one
# What may be better a moment later: kinds of failure, and their reasons.
RETRIED = {"dns": "dns", "timeout": "timeout", "server": r"http_429|http_5\d\d|refused|disconnected|truncated"}
REDIRECTS = frozenset({301, 302, 303, 307, 308})
USER_AGENT = "flm_scale/0.1 (image-text dataset preparation; honours X-Robots-Tag: noai, noimageai)"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# They wrap other addresses, or became special after Python's own list was made.
NEVER_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")))


class FetchError(DataError):
    """A file that was not got.

    `reason`: url, scheme, dns, private_address, refused, tls, timeout, disconnected, truncated, protocol, redirects, http_STATUS, too_large,
    encoding, opted_out, hash.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Request(NamedTuple):
    """What to get, and the hashes (hexadecimal) that its bytes must have."""

    url: str
    sha256: str = ""
    md5: str = ""


class Response(NamedTuple):
    """What came back."""

    content: bytes
    url: str
    """The last one, behind redirects."""
    content_type: str


@dataclass(frozen=True)
class FetchLimits:
    """What one fetch may take."""

    max_bytes: int = 16 * 1024**2
    total_seconds: float = 30.0
    """For everything: look-up, connections, redirects, headers and the last byte."""
    allow_loopback: bool = False
    """Allow 127.0.0.0/8 and ::1, for tests."""
    user_agent: str = USER_AGENT
    """Servers' owners read it; a large crawl should add an address where they can complain."""


class Fetcher:
    """Fetches in a thread of its own, so that the caller works on what has come while more comes. Close it, or use it in a with statement.

    The caller decides how much is under way: at most `in_flight` x max_bytes of memory, finished results that were not taken included.
    """

    def __init__(self, *, concurrency: int, limits: FetchLimits, retries: Mapping[str, int] | None = None) -> None:
        """concurrency: connections at a time.   retries: more tries by kind of failure, RETRIED's words."""
        self._concurrency, self._limits, self._retries = concurrency, limits, retries or {}
        self._results: queue.SimpleQueue[tuple[int, Future[Response]]] = queue.SimpleQueue()
        self._loop, self._closing, self._is_open = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
        self.in_flight = 0
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="fetch", daemon=True)
        self._thread.start()
        self._is_open.wait()

    def submit(self, number: int, request: Request) -> None:
        """Begin to fetch; `number` comes back with the result."""
        self.in_flight += 1
        future = asyncio.run_coroutine_threadsafe(self._fetch(request), self._loop)
        future.add_done_callback(lambda done: self._results.put((number, done)))

    def take(self, timeout: float | None = None) -> tuple[int, Response | FetchError] | None:
        """Return (number, result) of one that has finished, in whatever order; None when nothing does within `timeout` seconds."""
        try:
            number, done = self._results.get(timeout=timeout)
        except queue.Empty:
            return None
        self.in_flight -= 1
        try:
            return number, done.result()
        except FetchError as error:
            return number, error

    def close(self) -> None:
        """Give up what is under way."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _serve(self) -> None:
        async with open_session(concurrency=self._concurrency, limits=self._limits) as self._session:
            self._is_open.set()
            await self._closing.wait()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    async def _fetch(self, request: Request) -> Response:
        left = dict(self._retries)
        for pause in itertools.count():
            try:
                return await fetch(self._session, request, limits=self._limits)
            except FetchError as error:
                kind = next((kind for kind, reasons in RETRIED.items() if re.fullmatch(reasons, error.reason)), "")
                if left.get(kind, 0) <= 0:
                    raise
                left[kind] -= 1
            await asyncio.sleep(RETRY_SECONDS * 2**pause)
        raise AssertionError  # the loop has no end


@asynccontextmanager
async def open_session(*, concurrency: int, limits: FetchLimits) -> AsyncIterator[aiohttp.ClientSession]:
    """Open connections that go to public addresses alone."""
    resolver = _Resolver(threads=concurrency)
    connector = aiohttp.TCPConnector(limit=concurrency, resolver=resolver,
                                     socket_factory=lambda info: _checked_socket(info, allow_loopback=limits.allow_loopback))
    headers = {"User-Agent": limits.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    try:
        async with aiohttp.ClientSession(connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False,
                                         auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None)) as session:
            yield session
    finally:
        await resolver.close()


async def fetch(session: aiohttp.ClientSession, request: Request, *, limits: FetchLimits) -> Response:
    """Get one file, through at most five redirects. Raises FetchError."""
    url = _checked_url(request.url)
    try:
        async with asyncio.timeout(limits.total_seconds):
            for _ in range(MAX_REDIRECTS + 1):
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in REDIRECTS:
                        content = await _body(response, limits.max_bytes)
                        _check_hashes(request, content)
                        return Response(content, str(url), response.content_type)
                    url = _checked_url(response.headers.get("Location", ""), base=url)
    except TimeoutError as error:
        raise FetchError(_message(url, f"took over {limits.total_seconds:g} s"), reason="timeout") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise FetchError(_message(url, str(error) or type(error).__name__), reason=_reason(error)) from error
    raise FetchError(_message(url, f"more than {MAX_REDIRECTS} redirects"), reason="redirects")


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Check status and headers, then read no more than allowed."""
    if response.status != 200:
        _refuse(response.url, f"http_{response.status}", f"answer {response.status}")
    # An author who opts out for one crawler of AI is taken to mean them all.
    if any(re.search(r"\b(noai|noimageai)\b", value, re.IGNORECASE) for value in response.headers.getall("X-Robots-Tag", [])):
        _refuse(response.url, "opted_out", "the author has opted out (X-Robots-Tag)")
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        _refuse(response.url, "encoding", "a compressed answer, which was not asked for")
    parts, size = [], response.content_length or 0
    if size <= max_bytes:
        size = 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                break
    if size > max_bytes:
        _refuse(response.url, "too_large", f"more than {max_bytes} bytes")
    return b"".join(parts)


def _checked_url(text: str, *, base: URL | None = None) -> URL:
    """Return the absolute URL of a request or a redirect. Raises FetchError for what is never connected to."""
    if not text or len(text) > MAX_URL_LENGTH or re.search(r"[\x00-\x20\x7f]", text):
        _refuse(text, "url", "it is empty, too long, or holds blanks or control characters")
    try:
        url = base.join(URL(text)) if base else URL(text)
        scheme, host, secret, _port = url.scheme, url.raw_host, url.user or url.password, url.port
    except (ValueError, TypeError) as error:
        raise FetchError(_message(text, str(error)), reason="url") from error
    if scheme not in ("http", "https"):
        _refuse(url, "scheme", "only http and https are fetched")
    if not host or secret:
        _refuse(url, "url", "it has no host, or a name or password")
    return url


def is_public(address: str) -> bool:
    """Say whether an IP address belongs to the public internet, with what it wraps (IPv4 in IPv6, NAT64)."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not any(ip in network for network in NEVER_PUBLIC)


class _PrivateAddressError(OSError):
    """Raised where aiohttp makes a socket; comes back inside a ClientConnectorError."""


def _checked_socket(info: tuple[Any, ...], *, allow_loopback: bool) -> socket.socket:
    """Make the socket for one address, which is then connected without another look-up."""
    family, kind, protocol, _name, (host, *_) = info
    if not (is_public(host) or (allow_loopback and ipaddress.ip_address(host).is_loopback)):
        raise _PrivateAddressError("not an address of the public internet")
    return socket.socket(family, kind, protocol)


class _Resolver(AbstractResolver):
    """The system's look-up, in threads of its own: the loop's few would let ten dead name servers hold up everything."""

    def __init__(self, *, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns")

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Return every address of a host."""
        infos = await asyncio.get_running_loop().run_in_executor(self._threads, lookup, host, port, family)
        return [ResolveResult(hostname=host, host=str(address[0]), port=port, family=found, proto=protocol, flags=socket.AI_NUMERICHOST)
                for found, _, protocol, _, address in infos]

    async def close(self) -> None:
        """Leave look-ups that hang behind."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def lookup(host: str, port: int, family: int) -> list[tuple[Any, ...]]:
    """Ask the system for the addresses of a host."""
    return list(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM))


# The first that an error, or what caused it, is one of.
REASONS = (
    (_PrivateAddressError, "private_address"), (socket.gaierror, "dns"), (UnicodeError, "dns"), (ssl.SSLError, "tls"), (aiohttp.InvalidURL, "url"),
    (aiohttp.ClientPayloadError, "truncated"), (aiohttp.ServerDisconnectedError, "disconnected"), (aiohttp.ClientConnectorError, "refused"),
)


def _reason(error: Exception) -> str:
    """Return the word for an error of aiohttp, asyncio or the system."""
    for cause in (error.__cause__, error):
        for kind, reason in REASONS:
            if isinstance(cause, kind):
                return reason
    return "disconnected" if isinstance(error, OSError) else "protocol"


def _check_hashes(request: Request, content: bytes) -> None:
    for name, expected in (("sha256", request.sha256), ("md5", request.md5)):
        if expected and (found := hashlib.new(name, content, usedforsecurity=False).hexdigest()) != expected.lower():
            _refuse(request.url, "hash", f"the {name} is {found}, not {expected}: other bytes than when the table was made")


def _refuse(url: object, reason: str, what: str) -> NoReturn:
    raise FetchError(_message(url, what), reason=reason)


def _message(url: object, what: str) -> str:
    """Make one short line: aiohttp quotes what the server sent, at any length."""
    return f"{str(url)[:200]!a} cannot be fetched ({' '.join(what.split())[:200]}); drop it or try again later"
