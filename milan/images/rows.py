"""The columns of a listing, which has a row for each image."""

from __future__ import annotations

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique name of the image: its path below the root, as POSIX
        ("path", pa.string()),  # the file with the image, below the root
        ("group", pa.int32()),  # Parquet: row group; else null
        ("index", pa.int32()),  # Parquet: row in that group; else null
        ("offset", pa.int64()),  # tar: first byte of the image in the file; else null
        ("bytes", pa.int64()),  # size of the image; null where the listing does not say
        ("label", pa.int32()),  # class number, null if unknown
        ("caption", pa.string()),  # several of an image have BETWEEN_CAPTIONS in between
    ]
)
