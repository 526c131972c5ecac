"""S3 on loopback in a process of its own: moto, with what it leaves out of a PUT.

S3 compares a body with the digest sent along, and decides one PUT of a key after the other. The
port is printed when it listens; the process ends with its standard input.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
from collections.abc import Callable, Iterable
from threading import Lock, Thread
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BAD_DIGEST = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>BadDigest</Code><Message>The SHA256 you specified did not match the calculated \
checksum.</Message></Error>"""


class Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:  # type: ignore[override]
        pass


class Application:
    def __init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.one_at_a_time = Lock()

    def __call__(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "PUT":
            return self.moto(environ, start)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        stated = environ.get("HTTP_X_AMZ_CHECKSUM_SHA256")
        if stated and base64.b64encode(hashlib.sha256(body).digest()).decode() != stated:
            start("400 Bad Request", [("Content-Type", "application/xml")])
            return [BAD_DIGEST]
        environ["wsgi.input"] = io.BytesIO(body)
        with self.one_at_a_time:
            return list(self.moto(environ, start))


def main() -> None:
    http = make_server("127.0.0.1", 0, Application(), threaded=True, request_handler=Quiet)
    Thread(target=http.serve_forever, daemon=True).start()
    print(http.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
