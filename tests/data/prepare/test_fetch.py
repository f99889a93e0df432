"""Fetching from servers that mean harm: a word for every failure, and never a byte or a second more than allowed."""

import gzip
import hashlib
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flm_scale.data.prepare import fetch
from flm_scale.data.prepare.fetch import Fetcher, FetchError, FetchLimits, Request, Response, is_public
from tests.data.prepare.server import Server, answer, redirect

PICTURE = bytes(range(256)) * 8
LIMITS = FetchLimits(max_bytes=100_000, total_seconds=2.0, allow_loopback=True)
ENDLESS = b"x" * 65536


ANSWERS = {
    "/good": answer(PICTURE),
    "/%C3%BCber.png": answer(PICTURE),
    "/no-length": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + PICTURE,
    "/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n" + PICTURE + b"\r\n0\r\n\r\n",
    "/404": answer(b"gone", status="404 Not Found"),
    "/500": answer(b"", status="500 Oops"),
    "/204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "/stated-huge": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\nx",
    "/loop": redirect("/loop"),
    "/one-hop": redirect("good"),
    "/to-metadata": redirect("http://169.254.169.254/latest/meta-data"),
    "/to-file": redirect("file:///etc/passwd"),
    "/to-data": redirect("data:image/png;base64,aaaa"),
    "/to-private": redirect("http://10.0.0.1/"),
    "/to-credentials": redirect("http://user:secret@127.0.0.1/"),
    "/to-nowhere": answer(b"", status="302 Found"),
    "/to-garbage": redirect("http://[::bad/"),
    "/gzip": answer(gzip.compress(bytes(50_000_000)), "Content-Encoding: gzip"),
    "/early-close": b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + PICTURE,
    "/chunk-garbage": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzzz\r\nwhat",
    "/chunk-cut": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n" + PICTURE[:100],
    "/long-header": b"HTTP/1.1 200 OK\r\nX-Bomb: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "/many-headers": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(20_000)) + b"\r\n",
    "/nul-header": b"HTTP/1.1 200 OK\r\nX-Nul: a\0b\r\n\r\n",
    "/two-lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "/more-than-stated": answer(PICTURE) + PICTURE * 5,
    "/not-http": b"\x16\x03\x01 hello\r\n\r\n",
    "/says-nothing": b"",
    "/opted-out": answer(PICTURE, "X-Robots-Tag: googlebot: nosnippet, NoAI"),
    "/opted-out-of-images": answer(PICTURE, "X-Robots-Tag: noindex", "X-Robots-Tag: noimageai"),
    "/other-tag": answer(PICTURE, "X-Robots-Tag: noindex, noaiming"),
}
# Answers that go on: what comes first, what is repeated, and the seconds in between.
ENDLESS_ANSWERS = {
    "/endless": (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", ENDLESS, 0.0),
    "/slow-body": (b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n", b"x", 0.1),
    "/slow-header": (b"HTTP/1.1 200 OK\r\n", b"X-A: 1\r\n", 0.1),
    "/endless-404": (b"HTTP/1.1 404 No\r\nConnection: close\r\n\r\n", ENDLESS, 0.0),
    "/endless-redirect": (b"HTTP/1.1 302 Found\r\nLocation: /good\r\nContent-Length: 9999999\r\n\r\n", ENDLESS, 0.0),
    "/silent": (b"", b"", 0.1),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(ANSWERS, ENDLESS_ANSWERS)
    yield server
    server.stop()


def get(*requests: Request | str, limits: FetchLimits = LIMITS, concurrency: int = 32,
        retries: dict[str, int] | None = None) -> list[Response | FetchError]:
    """Return the results in the order of the requests."""
    waiting, results = list(enumerate(requests))[::-1], {}
    with Fetcher(concurrency=concurrency, limits=limits, retries=retries) as fetcher:
        while len(results) < len(requests):
            while waiting and fetcher.in_flight < concurrency:
                number, one = waiting.pop()
                fetcher.submit(number, Request(one) if isinstance(one, str) else one)
            number, results[number] = fetcher.take()
    return [results[number] for number in range(len(requests))]


def reason(result: Response | FetchError) -> str:
    return result.reason if isinstance(result, FetchError) else f"{len(result.content)} bytes"


def test_good_answers_come_back_whole(server: Server) -> None:
    for path in ("/good", "/no-length", "/chunked", "/one-hop", "/über.png", "/other-tag"):
        (result,) = get(server.url(path))
        assert isinstance(result, Response), result
        assert result.content == PICTURE
    assert get(server.url("/one-hop"))[0].url == server.url("/good")
    assert get(server.url("/good"))[0].content_type == "image/png"


REASONS = {
    "/404": "http_404", "/500": "http_500", "/204": "http_204", "/stated-huge": "too_large", "/endless": "too_large", "/loop": "redirects",
    "/to-metadata": "private_address", "/to-private": "private_address", "/to-file": "scheme", "/to-data": "scheme", "/to-credentials": "url",
    "/to-nowhere": "url", "/to-garbage": "url", "/gzip": "encoding", "/early-close": "truncated", "/chunk-cut": "truncated",
    "/chunk-garbage": "protocol",
    "/long-header": "protocol", "/many-headers": "protocol", "/nul-header": "protocol", "/two-lengths": "protocol",
    "/more-than-stated": "protocol", "/not-http": "protocol",
    "/says-nothing": "disconnected", "/opted-out": "opted_out", "/opted-out-of-images": "opted_out", "/slow-body": "timeout",
    "/slow-header": "timeout", "/silent": "timeout", "/endless-404": "http_404", "/endless-redirect": f"{len(PICTURE)} bytes",
}


def test_every_bad_answer_has_its_reason_within_the_deadline(server: Server) -> None:
    started = time.monotonic()
    results = get(*map(server.url, REASONS))
    assert {path: reason(result) for path, result in zip(REASONS, results, strict=True)} == REASONS
    assert time.monotonic() - started < LIMITS.total_seconds + 2
    assert all("\n" not in str(result) and len(str(result)) < 500 for result in results if isinstance(result, FetchError))


@pytest.mark.parametrize(("url", "expected"), [
    ("file:///etc/passwd", "scheme"), ("ftp://example.org/a", "scheme"), ("data:,x", "scheme"), ("//example.org/a", "scheme"), ("", "url"),
    ("http://", "url"), ("http://user:secret@example.org/", "url"), ("http://a b/", "url"), ("http://a/\r\nHost: b", "url"), ("http://a/\0", "url"),
    ("http://a:99999/", "url"), ("http://[::1", "url"), ("http://" + "a" * 9000, "url"), ("http://xn--\ud800/", "url"),
    ("http://127.0.0.1/", "private_address"), ("http://[::1]/", "private_address"), ("http://10.1.2.3/", "private_address"),
    ("http://169.254.169.254/latest", "private_address"), ("http://[::ffff:127.0.0.1]/", "private_address"),
    ("http://[64:ff9b::7f00:1]/", "private_address"), ("http://0.0.0.0/", "private_address"), ("http://0x7f.1/", "private_address"),
    ("http://2130706433/", "url"), ("http://127.1/", "url"), ("http://localhost/", "private_address"), ("http://224.0.0.1/", "private_address"),
    ("http://nowhere.invalid/", "dns"), (f"http://{'a' * 64}.example/", "dns"),
])
def test_address_that_must_not_be_asked_is_refused(url: str, expected: str) -> None:
    (result,) = get(url, limits=FetchLimits(total_seconds=20))
    assert reason(result) == expected, result


PRIVATE = ["0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.0.0.8", "192.168.1.1", "192.88.99.1", "198.18.0.1",
           "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::a00:1",
           "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1",
           "2002:a00:1::1", "3fff::1", "fc00::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_address_that_is_not_of_the_public_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1", "64:ff9b::808:808"])
def test_address_of_the_public_internet(address: str) -> None:
    assert is_public(address)


def test_name_that_resolves_to_a_private_address_is_refused_and_the_checked_address_is_the_one_connected_to(
        server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look-up gives an allowed address, any later one another: a second look-up would be seen."""
    asked = []

    def rebinding(host: str, port: int, family: int) -> list[tuple]:
        address = {"inside.example": "192.168.0.1", "metadata.example": "169.254.169.254"}.get(host, "10.0.0.1" if asked else "127.0.0.1")
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(fetch, "lookup", rebinding)
    monkeypatch.setattr(socket, "getaddrinfo", None)  # nobody else may look up
    assert reason(get(server.url("/good", "pictures.example"))[0]) == f"{len(PICTURE)} bytes"
    assert asked == ["pictures.example"]
    assert server.requests[-1].count(f"Host: pictures.example:{server.port}") == 1
    assert [reason(one) for one in get("http://inside.example/", "http://metadata.example/")] == ["private_address"] * 2


def test_look_up_that_hangs_ends_at_the_deadline_and_holds_nobody_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    real = fetch.lookup
    monkeypatch.setattr(fetch, "lookup", lambda host, *rest: free.wait(20) if host == "dead.example" else real(host, *rest))
    try:
        started = time.monotonic()
        results = get(*["http://dead.example/"] * 15, server.url("/good", "localhost"), concurrency=16)
        assert [reason(one) for one in results] == ["timeout"] * 15 + [f"{len(PICTURE)} bytes"]
        assert time.monotonic() - started < LIMITS.total_seconds + 2
    finally:
        free.set()


def test_bytes_must_have_the_stated_hashes(server: Server) -> None:
    url = server.url("/good")
    sha256, md5 = hashlib.sha256(PICTURE).hexdigest(), hashlib.md5(PICTURE).hexdigest()
    results = get(Request(url, sha256=sha256.upper(), md5=md5), Request(url, sha256="0" * 64), Request(url, md5="0" * 32))
    assert [reason(one) for one in results] == [f"{len(PICTURE)} bytes", "hash", "hash"]
    assert sha256 in str(results[1])


def test_server_learns_who_asks_and_nothing_else(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither cookies, nor a proxy or a password from the surroundings."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    ANSWERS["/cookie"] = answer(b"", "Set-Cookie: id=1; Path=/", "Location: /good", status="302 Found")
    assert reason(get(server.url("/cookie"))[0]) == f"{len(PICTURE)} bytes"
    sent = server.requests[-1]
    assert "User-Agent: flm_scale" in sent
    assert "Accept-Encoding: identity" in sent
    assert "cookie" not in sent.lower()
    assert "authorization" not in sent.lower()


def test_refused_connection() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert reason(get(f"http://127.0.0.1:{free.getsockname()[1]}/")[0]) == "refused"


def test_certificate_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
                   check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = Server(ANSWERS, tls=context)
    try:
        assert reason(get(server.url("/good"))[0]) == "tls"
    finally:
        server.stop()


def test_two_hundred_urls_of_which_a_tenth_is_bad_end_in_time_and_in_bounded_memory(server: Server) -> None:
    bad = ["/slow-body", "/endless", "/loop", "/404", "/gzip"]
    paths = [bad[number // 10 % 5] if number % 10 == 0 else "/good" for number in range(200)]
    get(server.url("/good"))  # imports and caches are not what is measured
    tracemalloc.start()
    started = time.monotonic()
    counts = Counter(reason(one) for one in get(*map(server.url, paths), concurrency=50))
    seconds, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts == {f"{len(PICTURE)} bytes": 180, "timeout": 4, "too_large": 4, "redirects": 4, "http_404": 4, "encoding": 4}
    assert seconds < 2 * LIMITS.total_seconds + 2
    assert peak < 50 * LIMITS.max_bytes + 20_000_000


def test_closing_gives_up_what_is_under_way(server: Server) -> None:
    started = time.monotonic()
    with Fetcher(concurrency=4, limits=LIMITS) as fetcher:
        for number, path in enumerate(["/good", "/slow-body", "/silent", "/endless-redirect"]):
            fetcher.submit(number, Request(server.url(path)))
        assert isinstance(fetcher.take()[1], Response)
        assert fetcher.in_flight in (2, 3)
    assert time.monotonic() - started < LIMITS.total_seconds
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch"]


def asked(server: Server, *paths: str) -> int:
    """Return how often these were asked for; what a test before has given up may still come in."""
    return sum(head.split()[1] in paths for head in server.requests)


@pytest.mark.parametrize(("path", "kind"), [("/500", "server"), ("/early-close", "server"), ("/slow-body", "timeout")])
def test_what_may_pass_is_tried_again_as_often_as_its_kind_is_allowed(path: str, kind: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RETRY_SECONDS", 0.01)
    limits = FetchLimits(max_bytes=100_000, total_seconds=0.5, allow_loopback=True)
    for retries, tries in (({}, 1), ({kind: 2}, 3), ({"dns": 5}, 1)):
        before = asked(server, path)
        (result,) = get(server.url(path), limits=limits, retries=retries)
        assert isinstance(result, FetchError)
        assert asked(server, path) - before == tries


def test_what_will_not_change_is_not_tried_again(server: Server) -> None:
    paths = ["/404", "/gzip", "/to-private", "/opted-out"]
    before = asked(server, *paths)
    results = get(*map(server.url, paths), retries={"dns": 3, "timeout": 3, "server": 3})
    assert [reason(result) for result in results] == ["http_404", "encoding", "private_address", "opted_out"]
    assert asked(server, *paths) - before == 4
