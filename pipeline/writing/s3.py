"""The S3 requests of a writer: conditional PUTs of whole objects, with a digest the server checks.

An answer may get lost although the request succeeded, and the client then sends it again. Where a
condition fails, the object that exists is therefore compared with the one that was to be put.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from milan.core.paths import Url, as_data_error, pieces_of
from milan.core.remote import os_errors

_NOT_FOUND = {"404", "NoSuchKey"}
_CONFLICT = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}


@dataclass(frozen=True)
class ObjectInfo:
    """An object as the server describes it."""

    etag: str
    bytes: int
    age: float
    """Seconds since it was put, by the server's clock alone; whole seconds."""
    sha256: str | None
    """Of the whole object, hexadecimal; None where the server keeps none."""


def head(where: Url) -> ObjectInfo | None:
    """The object at a URL; None if there is none. Raises DataError if the server does not say."""
    with as_data_error(where):
        answer = _request(where, "head_object", _NOT_FOUND, ChecksumMode="ENABLED")
    return _object_info(answer) if answer else None


def get(where: Url) -> tuple[bytes, ObjectInfo] | None:
    """A small object and its info by one request; None if there is none. Raises DataError."""
    from fsspec.asyn import sync

    with as_data_error(where), os_errors():
        answer = _request(where, "get_object", _NOT_FOUND, ChecksumMode="ENABLED")
        if answer is None:
            return None
        return sync(where.at()[0].loop, answer["Body"].read), _object_info(answer)


def put(where: Url, data: bytes, *, over: str | None) -> str | None:
    """Put an object in one request, over the one with the ETag `over`, or (None) where none is.

    Returns its ETag; None if there is another object. Raises DataError if it cannot be written,
    also if the server computes another digest.
    """
    digest = hashlib.sha256(data)
    with as_data_error(where, doing="written"):
        answer = _request(
            where, "put_object", _NOT_FOUND | _CONFLICT if over else _CONFLICT,
            Body=data, ChecksumAlgorithm="SHA256",
            ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            **({"IfMatch": over} if over else {"IfNoneMatch": "*"}),
        )  # fmt: skip
    if answer:
        return answer["ETag"]
    info = head(where)
    return info.etag if info and has_content(where, info, len(data), digest.hexdigest()) else None


def has_content(where: Url, info: ObjectInfo, size: int, sha256: str) -> bool:
    """Whether an object has this content; it is read where the server keeps no digest."""
    if info.bytes != size:
        return False
    if info.sha256 is None:
        digest = hashlib.sha256()
        with as_data_error(where):
            for piece in pieces_of(where):
                digest.update(piece)
        return digest.hexdigest() == sha256
    return info.sha256 == sha256


def delete(where: Url) -> None:
    """Remove an object, if it exists. Raises DataError."""
    with as_data_error(where, doing="removed"):
        _request(where, "delete_object", _NOT_FOUND)


def _request(
    where: Url, method: str, refusals: set[str], **arguments: Any
) -> dict[str, Any] | None:
    """A request's answer; None if the server refuses it with one of `refusals`. Raises OSError."""
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


def _object_info(answer: dict[str, Any]) -> ObjectInfo:
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    # An object that was copied in parts has a digest of digests.
    whole = answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
    digest = answer.get("ChecksumSHA256") if whole else None
    return ObjectInfo(
        answer["ETag"],
        answer["ContentLength"],
        (now - answer["LastModified"]).total_seconds(),
        base64.b64decode(digest).hex() if digest else None,
    )
