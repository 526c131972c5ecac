"""What a writer asks of S3: whole objects, put on a condition, with a digest the server checks.

An answer may be lost although the request was obeyed, and the client sends it again: where a
condition fails, what is there is therefore compared with what was meant to be there.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from milan.core.paths import Url, as_data_error, pieces_of
from milan.core.remote import os_errors

_NONE = {"404", "NoSuchKey"}
_OTHER = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}


@dataclass(frozen=True)
class ObjectInfo:
    """An object as the server has it."""

    etag: str
    bytes: int
    age: float
    """Seconds since it was put, by the server's clock alone; whole seconds."""
    sha256: str | None
    """Hexadecimal; None where the server keeps none of the whole."""


def head(where: Url) -> ObjectInfo | None:
    """What is at a place; None if nothing is. Raises DataError if the server does not say."""
    with as_data_error(where):
        answer = _ask(where, "head_object", _NONE, ChecksumMode="ENABLED")
    return _held(answer) if answer else None


def get(where: Url) -> tuple[bytes, ObjectInfo] | None:
    """A small object and what it is, of one request; None if there is none. Raises DataError."""
    from fsspec.asyn import sync

    with as_data_error(where), os_errors():
        answer = _ask(where, "get_object", _NONE, ChecksumMode="ENABLED")
        if answer is None:
            return None
        return sync(where.at()[0].loop, answer["Body"].read), _held(answer)


def put(where: Url, data: bytes, *, over: str | None) -> str | None:
    """Put an object in one request, over the one of that ETag, or where there is none.

    Returns its ETag; None if something else is there. Raises DataError if it cannot be written,
    also for a digest that the server finds wrong.
    """
    digest = hashlib.sha256(data)
    with as_data_error(where, doing="written"):
        answer = _ask(
            where, "put_object", _NONE | _OTHER if over else _OTHER,
            Body=data, ChecksumAlgorithm="SHA256",
            ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            **({"IfMatch": over} if over else {"IfNoneMatch": "*"}),
        )  # fmt: skip
    if answer:
        return answer["ETag"]
    held = head(where)
    return held.etag if held and same(where, held, len(data), digest.hexdigest()) else None


def same(where: Url, held: ObjectInfo, size: int, sha256: str) -> bool:
    """Whether an object has this content; read where the server keeps no digest."""
    if held.bytes != size:
        return False
    if held.sha256 is None:
        digest = hashlib.sha256()
        with as_data_error(where):
            for piece in pieces_of(where):
                digest.update(piece)
        return digest.hexdigest() == sha256
    return held.sha256 == sha256


def delete(where: Url) -> None:
    """Remove an object, if it is there. Raises DataError."""
    with as_data_error(where, doing="removed"):
        _ask(where, "delete_object", _NONE)


def _ask(where: Url, method: str, refusals: set[str], **arguments: Any) -> dict[str, Any] | None:
    """A request's answer; None if the server refuses it with one of these codes. Raises OSError."""
    fs, path = where.at()
    bucket, _, key = path.partition("/")
    try:
        with os_errors():
            return fs.call_s3(method, Bucket=bucket, Key=key, **arguments)
    except OSError as error:
        answer = getattr(error.__cause__, "response", None) or {}
        if answer.get("Error", {}).get("Code") in refusals:
            return None
        raise


def _held(answer: dict[str, Any]) -> ObjectInfo:
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    # Of an object that was copied in parts it is a digest of digests.
    whole = answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
    digest = answer.get("ChecksumSHA256") if whole else None
    return ObjectInfo(
        answer["ETag"],
        answer["ContentLength"],
        (now - answer["LastModified"]).total_seconds(),
        base64.b64decode(digest).hex() if digest else None,
    )
