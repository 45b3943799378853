"""Servers that are slow, endless or hostile: given up in one line, waited for where they are honest, never an error."""

from __future__ import annotations

import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.sources import connections
from accel_clip.data.sources.answers import LeadsNowhere, address_in, seconds_of, start_of_range, version_of
from accel_clip.data.sources.base import SourceOptions, Stream
from accel_clip.data.sources.connections import Patience
from accel_clip.data.sources.remote_file import RemoteFile
from accel_clip.data.sources.resolve import locate
from accel_clip.data.sources.shards import remote as remote_shards
from accel_clip.data.sources.shards import tar_headers
from accel_clip.data.sources.shards.remote import open_remote_shards
from accel_clip.faults import AccelClipError, ConfigError, DataError
from accel_clip.process.signals import Interruptible
from helpers.patience import HANG_SECONDS, within
from helpers.shards import numbered, write_tar
from helpers.web import rudely_served

OK = b"HTTP/1.1 200 OK\r\n"
PLAIN = OK + b"\r\n"
SHORT = Patience(waits_seconds=(0.0,), read_seconds=0.3, window_seconds=0.3, least_bytes=1000)
LONG = Patience(waits_seconds=(0.0,), read_seconds=HANG_SECONDS, window_seconds=HANG_SECONDS)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def tar(tmp_path: Path) -> bytes:
    """Return an archive of eight samples."""
    return write_tar(tmp_path / "0.tar", numbered(0, 8)).read_bytes()


def opened(address: str, patience: Patience = LONG) -> Stream:
    written = f"{address}/0.tar"
    return open_remote_shards(written, [written], SourceOptions("x"), patience, patience)


def every(seconds: float, *first: bytes, then: bytes) -> Iterator[bytes]:
    """Yield pieces at once, and then one after the other without end."""
    yield from first
    while True:
        time.sleep(seconds)
        yield then


def endless(*first: bytes, then: bytes) -> Iterator[bytes]:
    """Yield pieces, the last of them without end, in lumps of 64 KiB."""
    yield from first
    while True:
        yield then * (1 + (1 << 16) // len(then))


# --- too little in too long a time

TRICKLES: dict[str, Callable[[], Iterator[bytes]]] = {
    "bytes of the file": lambda: every(0.03, PLAIN, then=b"x"),
    "bytes of the status": lambda: every(0.03, then=b"H"),
    "bytes of a header": lambda: every(0.03, OK + b"X: ", then=b"x"),
    "headers": lambda: every(0.03, OK, then=b"X: y\r\n"),
    "a promise to answer": lambda: every(0.03, then=b"HTTP/1.1 102 Processing\r\n\r\n"),
    "bytes of a note on a chunk": lambda: every(0.03, OK + b"Transfer-Encoding: chunked\r\n\r\n5;", then=b"x"),
    "small chunks": lambda: every(0.03, OK + b"Transfer-Encoding: chunked\r\n\r\n", then=b"1\r\nx\r\n"),
    "trailers": lambda: every(0.03, OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", then=b"X: y\r\n"),
}


@pytest.mark.parametrize("way", TRICKLES)
def test_a_server_that_sends_next_to_nothing_is_given_up(way: str) -> None:
    told: list[str] = []
    patience = replace(SHORT, tell=told.append)
    with within(10), rudely_served(lambda head: TRICKLES[way]()) as address, pytest.raises(DataError) as caught:
        opened(address, patience)
    message = str(caught.value)
    assert "\n" not in message and f"{address}/0.tar: " in message
    if way != "trailers":  # the file has ended then
        assert len(told) == 1 and told[0].startswith(f"{address}/0.tar: ")
        assert " bytes of the file in 0." in message and "where the least is 1,000 in 0.3 s" in message


def test_a_server_that_falls_asleep_is_asked_again_and_the_shard_goes_on(tar: bytes) -> None:
    half = len(tar) // 2

    def sleepy(head: bytes) -> Iterator[bytes]:
        if b"Range" in head:
            start = int(head.partition(b"bytes=")[2].partition(b"-")[0])
            yield f"HTTP/1.1 206 x\r\nContent-Range: bytes {start}-{len(tar) - 1}/{len(tar)}\r\n\r\n".encode()
            yield tar[start:]
        else:
            yield OK + f"Content-Length: {len(tar)}\r\n\r\n".encode() + tar[:half]
            time.sleep(2)

    patience = replace(SHORT, read_seconds=1.0, window_seconds=1.0)
    with rudely_served(sleepy) as address:
        items = list(opened(address, patience).read(0, 0))
    assert len(items) == 8 and not any(isinstance(item.pair, UnusableSample) for item in items)


def test_a_slow_line_is_fast_enough_and_so_is_a_slow_reader(tmp_path: Path) -> None:
    members = {f"{n}.{end}": os.urandom(20_000) if end == "jpg" else b"x" for n in range(8) for end in ("jpg", "txt")}
    tar = write_tar(tmp_path / "0.tar", members).read_bytes()

    def slow(head: bytes) -> Iterator[bytes]:
        yield PLAIN
        for start in range(0, len(tar), 4096):
            time.sleep(0.02)
            yield tar[start : start + 4096]

    window = 0.3  # of the default's 60 seconds; the line is ten times as fast as it takes: sleep may last longer
    by_default = Patience()
    least = int(by_default.least_bytes * window / by_default.window_seconds) * 75  # of as many readers
    patience = Patience((), window_seconds=window, least_bytes=least)
    assert by_default.least_bytes / by_default.window_seconds * 75 < 20.5 * 1024
    with rudely_served(slow) as address:
        items = list(opened(address, patience).read(0, 0))
        assert len(items) == 8 and not any(isinstance(item.pair, UnusableSample) for item in items)
    with rudely_served(lambda head: iter([PLAIN, tar])) as address, RemoteFile(f"{address}/x", 0, patience) as file:
        for _ in range(4):
            assert len(file.read(1000)) == 1000
            time.sleep(window)


def test_a_server_without_ranges_may_send_again_what_is_passed_over(tar: bytes) -> None:
    """What a slow line carries a second time is the file too."""
    numbers = count()

    def from_the_beginning(head: bytes) -> Iterator[bytes]:
        yield OK + f"Content-Length: {len(tar)}\r\n\r\n".encode()
        end = len(tar) if next(numbers) else len(tar) - 3000
        for start in range(0, end, 1024):
            time.sleep(0.01)
            yield tar[start : min(start + 1024, end)]

    patience = Patience((0.0,), window_seconds=0.1, least_bytes=1000)
    with rudely_served(from_the_beginning) as address, RemoteFile(f"{address}/x", 0, patience) as file:
        assert file.read(len(tar)) == tar


def test_a_signal_is_heard_while_a_server_is_waited_for() -> None:
    def later() -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=later)
    server = rudely_served(lambda head: every(0.2, PLAIN, then=b"x"))
    heard = pytest.raises(KeyboardInterrupt)
    with within(10), server as address, RemoteFile(f"{address}/x") as file, heard, Interruptible():
        thread.start()
        file.read(100_000)
    thread.join()


def test_a_proxy_of_the_environment_is_asked(tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []
    with rudely_served(lambda head: (heads.append(head), iter([PLAIN, tar]))[1]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.replace("//", "//me:word@"))
        monkeypatch.setenv("NO_PROXY", "other.invalid")
        assert len(list(opened("http://example.invalid").read(0, 0))) == 8
    assert heads[0].startswith(b"GET http://example.invalid/0.tar HTTP/1.1") and b"Proxy-Authorization" in heads[0]
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    monkeypatch.setattr(connections, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="speaks SOCKS"):
        opened("http://example.invalid")


# --- without end, as fast as can be

FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "of promises": lambda: endless(then=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "of headers": lambda: endless(OK, then=b"X: y\r\n"),
    "of one header": lambda: endless(OK + b"X: ", then=b"x"),
    "of a note on a chunk": lambda: endless(OK + b"Transfer-Encoding: chunked\r\n\r\n5;", then=b"x"),
    "of zeros of a chunk's length": lambda: endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", then=b"0"),
    "of status": lambda: endless(then=b"H"),
    "behind a redirect": lambda: endless(b"HTTP/1.1 302 Found\r\nLocation: /0.tar\r\n\r\n", then=b"x"),
    "behind an error": lambda: endless(b"HTTP/1.1 503 Busy\r\n\r\n", then=b"x"),
    "of a packed redirect": lambda: endless(
        b"HTTP/1.1 302 Found\r\nLocation: /0.tar\r\nContent-Encoding: gzip\r\n\r\n", then=b"\x1f\x8b"
    ),
}


@pytest.mark.parametrize("way", FLOODS)
def test_a_flood_is_left(way: str) -> None:
    patience = Patience((0.0,), window_seconds=HANG_SECONDS)
    with within(10), rudely_served(lambda head: FLOODS[way]()) as address, pytest.raises(DataError) as caught:
        opened(address, patience)
    assert "\n" not in str(caught.value)


# --- archives without end


def header(name: bytes, kind: bytes = b"0", num_bytes: int = 0) -> bytes:
    info = tarfile.TarInfo(name.decode())
    info.type, info.size = kind, num_bytes
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def sparse_map() -> bytes:
    """Return the beginning of a sparse file, whose map goes on and on in blocks that say so."""
    block = bytearray(header(b"x.jpg", b"S"))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


ARCHIVES = {
    "nameless members": [header(b"x")],
    "members of WebDataset's own": [header(b"__x__/1.jpg")],
    "folders": [header(b"x", b"5")],
    "links": [header(b"x.jpg", b"2")],
    "sparse files": [header(b"x.jpg", b"S")],
    "pax headers": [header(b"x", b"x", 13) + padded(b"13 path=1.jpg")],
    "empty pax headers": [header(b"x", b"x")],
    "global pax headers": [header(b"x", b"g", 13) + padded(b"13 comment=x\n")],
    "long names": [header(b"x", b"L", 6) + padded(b"1.jpg\0")],
    "a map of holes": [sparse_map(), b"\0" * 504 + b"\1" * 8],
    "members that nothing asks for": [header(b"1.npy", num_bytes=3) + padded(b"abc")],
    "one sample": [header(b"1.jpg", num_bytes=3) + padded(b"abc")],
}


def archive(kind: str) -> Iterator[bytes]:
    *first, last = ARCHIVES[kind]
    return endless(PLAIN, *first, then=last)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_without_end_stops_the_start(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_shards, "BYTES_TO_LOOK_AT", 1 << 21)
    monkeypatch.setattr(remote_shards, "MOST_MEMBERS_FOR_A_SAMPLE", 3000)
    monkeypatch.setattr(tar_headers, "MOST_SPARSE_BLOCKS", 3000)
    refused = pytest.raises((DataError, ConfigError))
    with within(10), rudely_served(lambda head: archive(kind)) as address, refused as caught:
        opened(address)
    assert "\n" not in str(caught.value) and "/0.tar" in str(caught.value)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_without_end_is_left_in_training(kind: str, tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_shards, "BYTES_TO_LOOK_AT", 1 << 21)
    monkeypatch.setattr(remote_shards, "MOST_MEMBERS_FOR_A_SAMPLE", 3000)
    monkeypatch.setattr(tar_headers, "MOST_SPARSE_BLOCKS", 3000)
    *first, last = ARCHIVES[kind]
    good = tar[: tar.rindex(b"\0" * 1024)].rstrip(b"\0")
    with within(10), rudely_served(lambda head: endless(PLAIN, padded(good), *first, then=last)) as address:
        items = list(opened(address).read(0, 0))
    assert len(items) == 9 + (kind == "one sample") and isinstance(items[-1].pair, UnusableSample), items[-1]
    assert items[-1].pair.reason in ("unreadable", "truncated_shard")
    assert not any(isinstance(item.pair, UnusableSample) for item in items[:8])


def test_few_members_between_samples_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_shards, "MOST_MEMBERS_FOR_A_SAMPLE", 12)
    members = {f"{n}.{end}": b"x" for n in range(50) for end in ("jpg", "txt", *map(str, range(9)))}
    tar = write_tar(tmp_path / "0.tar", members).read_bytes()
    with rudely_served(lambda head: iter([PLAIN, tar])) as address:
        items = list(opened(address).read(0, 0))
    assert len(items) == 50 and not any(isinstance(item.pair, UnusableSample) for item in items)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet", "x.tar"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_has_no_end_on_a_disk_is_no_data(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"neither a file nor a folder|are missing"):
        locate(str(tmp_path / name))


# --- answers that make no sense

NONSENSE = {
    "Retry-After": [
        "²",
        "٣",
        "9" * 5000,
        "-1",
        "1e9",
        "Fri, 31 Dec 9999 23:59:59 -1200",
        "Fri, 31 Dec 99999 0:0:0 GMT",
    ],
    "Content-Range": ["bytes 0-" + "9" * 5000 + "/*", "bytes " + "1" * 5000 + "-2/3", "bytes ²-3/4", "bytes */-1", "x"],
    "Content-Length": ["9" * 5000, "-1", "²", "1, 2", "+5", "1e3", "0x10", ""],
    "ETag": ["W/", '"\x80\xff"', '"' + "x" * 90_000 + '"', "\t", '"a\x0bb"'],
    "Last-Modified": ["x" * 5000, "\xff\xfe", "never"],
    "Content-Encoding": ["gzip", "gzip, gzip, gzip", "x" * 999],
    "Transfer-Encoding": ["gzip, chunked", "chunked, chunked", "x"],
    "Set-Cookie": ["a=b; expires=Fri, 31-Dec-99999 23:59:59 GMT", "=" * 9999, "a=b; domain=..; max-age=²"],
    "Location": [
        *("http://" + "a" * 70 + "/", "http://a..b/", "http://h:99999/", "http://h:0/", "http://h:-1/", "http://h:²/"),
        *(
            "http://[",
            "http://[::1",
            "http://[::g]/",
            "http:///x",
            "http:",
            "//",
            "//..",
            "https://u:p@a..b/",
            "?" * 70000,
        ),
        *(
            "file:///etc/passwd",
            "data:text/plain,x",
            "javascript:x",
            "ftp://h/x",
            "unix:/run/x",
            "http://\xff/",
            "\x01",
        ),
        *(
            "http://xn--a-\xe9.\u3002/".encode().decode("latin-1"),
            "http://" + "a." * 200 + "b/",
            "http://%00/",
            "mailto:x",
        ),
        *(
            "http://h:" + "9" * 5000 + "/",
            "http://1.2.3.4.5.6/",
            "HTTP://[v1.x]/",
            "\\\\h\\x",
            "http://h\t/",
            "http://.h/",
        ),
    ],
}
STATUSES = ["200 OK", "206 Partial", "301 x", "302 x", "307 x", "416 x", "429 x", "503 \xff\xfe", "101 Switch", "304 x"]
LINES = [
    "HTTP/1.1 2000 x",
    "HTTP/9.9 200 OK",
    "HTTP/1.1 ² x",
    "HTTP/1.1 200" + " " * 9999,
    "ICY 200 OK",
    "",
    "\0",
    "GET / HTTP/1.1",
]


def answers() -> some.SearchStrategy[bytes]:
    """Return heads of answers: of nonsense that is known to hurt, and of any bytes at all."""
    word = some.text(some.characters(max_codepoint=255), max_size=40)
    header = some.sampled_from(sorted(NONSENSE)).flatmap(
        lambda name: some.tuples(some.just(name), some.sampled_from(NONSENSE[name]) | word)
    )
    any_header = header | some.tuples(word, word)
    line = some.sampled_from([f"HTTP/1.1 {status}" for status in STATUSES] + LINES) | word
    heads = some.builds(head_of, line, some.lists(any_header, max_size=4))
    return some.builds(bytes.__add__, heads, some.binary(max_size=60)) | some.binary(max_size=99)


def head_of(line: str, headers: list[tuple[str, str]]) -> bytes:
    lines = [line, *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


class Replier:
    """Answers with what is said last, whatever is asked."""

    def __init__(self) -> None:
        self.said = b""

    def __call__(self, head: bytes) -> Iterator[bytes]:
        yield self.said


def require_one_line(address: str, start: int = 0) -> None:
    """Read from a server, and fail unless what comes of it is bytes or an unusable sample that one line describes."""
    patience = Patience((0.0,), longest_wait_seconds=0.0, read_seconds=1.0, sleep=lambda seconds: None)
    with RemoteFile(f"{address}/0.tar", start, patience) as file:
        try:
            file.read(1 << 20)
        except UnusableSample as problem:
            assert problem.reason in ("missing_file", "truncated_shard") and len(problem.detail) < 2000


@pytest.mark.parametrize("name", NONSENSE)
def test_headers_that_make_no_sense_are_no_error(name: str) -> None:
    replier = Replier()
    with rudely_served(replier) as address:
        for value in NONSENSE[name]:
            for status in STATUSES:
                replier.said = head_of(f"HTTP/1.1 {status}", [(name, value)]) + b"x"
                require_one_line(address)
                require_one_line(address, 5)


@pytest.mark.parametrize("num_answers", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_answer_at_all_is_an_error(num_answers: int) -> None:
    replier = Replier()
    with rudely_served(replier) as address:

        @settings(max_examples=num_answers, deadline=None, database=None, derandomize=True)
        @given(answers(), some.sampled_from([0, 7]))
        def answered(said: bytes, start: int) -> None:
            replier.said = said
            require_one_line(address, start)

        answered()


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(some.text(max_size=60), some.text(max_size=60))
@example("http://" + "a" * 70, "Fri, 31 Dec 9999 23:59:59 -1200")
@example("http://a..b", "²")
def test_words_of_servers_are_read_or_not(location: str, words: str) -> None:
    before = address_in("http://127.0.0.1:80/a/b.tar?c")
    for written in (location, f"http://{location}", f"//{location}/x", f"/{location}"):
        try:
            found = address_in(written, before)
        except LeadsNowhere as problem:
            assert len(str(problem)) < 2000
        else:
            assert found.scheme in ("http", "https") and 0 < (found.port or 80) < 1 << 16
            assert all(0 < len(label) < 64 for label in found.raw_host.rstrip(b".").split(b"."))
    assert 0 <= seconds_of(words) < 1e19
    headers: dict[str, Any] = {"Content-Range": f"bytes {words}", "ETag": words, "Content-Length": words}
    start_of_range(httpx2.Headers({name: value.encode() for name, value in headers.items()}))
    version_of(httpx2.Headers({name: value.encode() for name, value in headers.items()}))


@pytest.mark.parametrize("host", ["a" * 70, "a..b", "h:99999", "h:0", ".", "h:x"])
def test_hosts_that_are_none_are_refused_in_settings(host: str) -> None:
    with pytest.raises(AccelClipError, match=r"data\.train: .* is no address"):
        locate(f"https://{host}/0.tar")


def test_a_redirect_to_nowhere_says_where(tar: bytes) -> None:
    said = b"HTTP/1.1 302 Found\r\nLocation: http://" + b"a" * 70 + b"/\r\n\r\n"
    with rudely_served(lambda head: iter([said])) as address, pytest.raises(DataError) as caught:
        opened(address)
    assert f"{address}/0.tar: the address leads nowhere: 'http://aaa" in str(caught.value)
