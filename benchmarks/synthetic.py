"""Artificial stores for benchmarks: real files, records and checksums, random targets.

One block of random targets is written; every further block is hard links to it, so a store of a
million rows takes the disk space of a thousand.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from milan.images.decode import content_digest, decode
from milan.images.manifest import Manifest
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, checksum, pack, render, unpack, view_of
from milan.store.codecs import codec_of
from milan.store.format import GENERATION, CacheSpec, canonical
from pipeline.extraction.worker import _row_checksums
from pipeline.writing.shards import stage_shard
from pipeline.writing.store import Store, group_attributes


def make_store(
    path: Path,
    manifest: Manifest,
    *,
    shard_size: int,
    root: Path | None = None,
    stored_views: str = "none",
) -> Path:
    """A finished int8 store of one view, [197, 512]; rows must fill its shards.

    With `root`, the views of the images there are rendered and their checksums stored, so the
    store can be trained on. It then has one block, and may have `stored_views`.
    """
    spec = CacheSpec(
        manifest=manifest.digest(), rows=len(manifest), views=1, tokens=197, channels=512,
        codec="int8", shard_size=shard_size, view_law=ViewSpec().law(), teacher={"name": "none"},
        stored_views=stored_views,
    )  # fmt: skip
    codec = codec_of("int8").fitted(torch.ones(1, 512))
    store = Store(path)
    about = {"name": "none", "pretrained": "none", "random_weights": True}
    files = {"manifest.parquet": manifest.to_parquet(), "fidelity.json": b"{}"}
    files["origin.json"] = canonical({
        "data": str(root), "data_root": str(root), "data_root_from_store": None, "teacher": {},
        "batch_size": 1,
    })  # fmt: skip
    tables = {f"codec/{name}": table for name, table in codec.tables.items()}
    writer = store.generation(
        GENERATION, spec, lambda: (group_attributes(spec, about), tables, files)
    )
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.integers(-127, 128, (shard_size, 197, 512), np.int8),
        "scale": rng.random((shard_size, 197), np.float32),
        "attention": rng.random((shard_size, 196), np.float32) + 0.1,
        "crop": np.zeros((shard_size, 5), np.int32),
    }
    pixels, digests, pictures = [0] * shard_size, [""] * shard_size, list[bytes]()
    if root:
        source = ImageSource(manifest, root)
        for row in range(shard_size):
            data = source.read(row)
            image = decode(data)
            view = view_of(ViewSpec(), row, view=0, height=image.height, width=image.width)
            arrays["crop"][row] = (view.top, view.left, view.height, view.width, view.flip)
            rendered = render(image, view, size=224)
            if stored_views != "none":
                pictures.append(pack(rendered, stored_views))
                rendered = unpack(pictures[-1])
            pixels[row] = checksum(rendered)
            digests[row] = content_digest(data)
    first = writer.stage("first")
    written = stage_shard(first, spec, 0, 0, arrays, pictures)
    record = {
        "view": 0, "bad": {}, "digests": digests, "pixels": pixels,
        "crc32c": {name: _row_checksums(rows, {}, 0) for name, rows in arrays.items()},
    }  # fmt: skip
    if pictures:
        record["ends"] = np.cumsum([len(data) for data in pictures]).tolist()
    for block in range(spec.blocks):
        folder, linked = store.backend.staging / str(block), []
        for file in written:
            name = file["path"].split("/")[0]
            target = spec.files(block, 0)[name]
            (folder / target).parent.mkdir(parents=True)
            os.link(first / file["path"], folder / target)
            linked.append(file | {"path": target})
        rows = list(spec.block_rows(block))
        writer.commit(folder, record | {"block": block, "rows": rows, "files": linked})
    store.publish(writer.finish("none/int8"))
    store.close()
    return path
