"""An S3 server on loopback (s3_server.py) behind a proxy with faults (s3_proxy.py): fixtures."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_proxy import Proxy

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    """Of a moto server."""
    for package in ("moto", "s3fs"):
        pytest.importorskip(
            package, reason="pip install milan-pretrain[test]: buckets are not tested"
        )
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("s3_server.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin
    assert server.stdout
    yield int(server.stdout.readline())
    server.stdin.close()
    server.wait(10)


@pytest.fixture(scope="module")
def s3(port: int) -> Iterator[Proxy]:
    """The proxy before it; the environment points there, and there is a bucket `models`."""
    import boto3
    from helpers import forget
    from s3_proxy import Proxy

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        proxy = Proxy(port)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(asked).close()  # of another module
        boto3.client("s3").create_bucket(Bucket="models")
        forget()  # another module's server
        yield proxy
        proxy.stop()


def allow(port: int, requests: str) -> None:
    """Let the server answer so many requests without asking who it is; then refuse."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/moto-api/reset-auth",
        requests.encode(),
        {"Content-Type": "text/plain"},
    )
    urllib.request.urlopen(asked).close()


def put_files(bucket: str, files: dict[str, bytes], acl: str = "private") -> None:
    """Make a bucket, if there is none, with these files by key."""
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    for key, data in files.items():
        client.put_object(Bucket=bucket, Key=key, Body=data, ACL=acl)
