"""Between a client and an S3 server: passes requests on, or does to them what networks do."""

from __future__ import annotations

import socket
from collections.abc import Callable
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import NamedTuple


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


Fault = Callable[[Request], str | None]
"""What happens to a request: None (nothing), 500 or 503 (answered so), cut (the connection ends in
the middle of the body), lost (obeyed, but the answer does not arrive), corrupt (a bit of the body
is flipped), deaf (conditions are taken out)."""


class Proxy:
    """Listens on loopback; `fault` decides what happens to each request, `seen` lists them."""

    def __init__(self, port: int) -> None:
        self.fault: Fault = lambda request: None
        self.seen: list[tuple[Request, str | None]] = []
        proxy = self

        class Handler(StreamRequestHandler):
            def handle(self) -> None:
                try:
                    while proxy.pass_on(self, port):
                        pass
                except OSError:
                    pass  # a client that has gone

        class Server(ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self.tcp = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.tcp.server_address[1]}"
        Thread(target=self.tcp.serve_forever, daemon=True).start()

    def pass_on(self, client: StreamRequestHandler, port: int) -> bool:
        first = client.rfile.readline()
        if not first.strip():
            return False
        lines = []
        while (line := client.rfile.readline()).strip():
            lines.append(line)
        headers = {k.strip().lower(): v.strip() for k, v in
                   (line.decode().split(":", 1) for line in lines)}  # fmt: skip
        method, path, _ = first.decode().split()
        request = Request(method, path, headers)
        fault = self.fault(request)
        self.seen.append((request, fault))
        if "expect" in headers:
            client.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(headers.get("content-length", 0))
        body = client.rfile.read(length // 2 if fault == "cut" else length)
        if fault == "cut":
            return False
        if fault in ("500", "503"):
            client.wfile.write(
                f"HTTP/1.1 {fault} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )
            return False
        if fault == "corrupt":
            body = body[: length // 2] + bytes([body[length // 2] ^ 1]) + body[length // 2 + 1 :]
        kept = [line for line in lines if not line.lower().startswith((b"expect", b"connection"))]
        if fault == "deaf":
            kept = [line for line in kept if not line.lower().startswith(b"if-")]
        with socket.create_connection(("127.0.0.1", port)) as server:
            server.sendall(first + b"".join(kept) + b"Connection: close\r\n\r\n" + body)
            answer = b""
            while piece := server.recv(1 << 16):
                answer += piece
        if fault == "lost":
            return False
        client.wfile.write(answer)
        return False  # the answer ends with the connection

    def stop(self) -> None:
        self.tcp.shutdown()
        self.tcp.server_close()
