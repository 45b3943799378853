"""Web servers in threads that answer as badly as a test wants them to: files badly served, or bytes of any kind."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NEVER = 1 << 60


@dataclass
class Behaviour:
    """How files are served.

    drop_after: bytes of a body after which the connection breaks, the first `num_drops` times; statuses: answers given
    instead of the first ones; headers: sent with these; told: what each request asked for, its path and Range.
    """

    knows_ranges: bool = True
    says_length: bool = True
    drop_after: int = NEVER
    num_drops: int = NEVER
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    entity_tag: str | None = '"one"'
    told: list[tuple[str, str | None]] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def served(folder: Path, behaviour: Behaviour | None = None) -> Iterator[str]:
    """Serve the files of a folder, and yield the address that stands for it."""
    behaviour = behaviour or Behaviour()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, folder, behaviour)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(request: BaseHTTPRequestHandler, folder: Path, behaviour: Behaviour) -> None:
    """Answer a request."""
    wanted = request.headers.get("Range")
    behaviour.told.append((request.path, wanted))
    behaviour.asked.append(dict(request.headers))
    path = folder / request.path.lstrip("/").partition("?")[0]
    status = behaviour.statuses.pop(0) if behaviour.statuses else (200 if path.is_file() else 404)
    if status != 200:
        request.send_response(status)
        for name, value in behaviour.headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    send_file(request, path.read_bytes(), wanted if is_of(request, behaviour) else None, behaviour)


def is_of(request: BaseHTTPRequestHandler, behaviour: Behaviour) -> bool:
    """Return whether the part that is asked for is one of the file as it is now."""
    return behaviour.knows_ranges and request.headers.get("If-Range") in (None, behaviour.entity_tag)


def send_file(request: BaseHTTPRequestHandler, content: bytes, wanted: str | None, behaviour: Behaviour) -> None:
    """Send a file from the byte on that a Range names."""
    start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
    if wanted and start >= len(content):
        request.send_response(416)
        request.send_header("Content-Range", f"bytes */{len(content)}")
        request.end_headers()
        return
    request.send_response(206 if wanted else 200)
    if wanted:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    if behaviour.entity_tag:
        request.send_header("ETag", behaviour.entity_tag)
    if behaviour.says_length:
        request.send_header("Content-Length", str(len(content) - start))
    request.end_headers()
    body = content[start:]
    if behaviour.num_drops > 0 and behaviour.drop_after < len(body):
        behaviour.num_drops -= 1
        body = body[: behaviour.drop_after]
    with suppress(OSError):  # the reader has left
        request.wfile.write(body)


Rude = Callable[[bytes], Iterator[bytes]]
"""From the head of a request to what is sent, piece by piece; then the connection is closed."""


@contextmanager
def rudely_served(rude: Rude) -> Iterator[str]:
    """Answer every request with bytes of any kind, without end if they have none, and yield the server's address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # the reader has left
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for piece in rude(head_of_request(self.request)):
                    self.request.sendall(piece)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, request_queue_size = True, False, 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def head_of_request(connection: socket.socket) -> bytes:
    """Return a request up to its empty line."""
    head = b""
    while b"\r\n\r\n" not in head and (more := connection.recv(1 << 16)):
        head += more
    return head
