"""`milan neighbours`: the images most like one, as a sheet; nearly equal pairs, as a list.

The search is exact: cosines of all vectors, some thousand at once, so that memory does not grow
with their number.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from milan.core.config_resolver import from_call
from milan.core.device import pick_device
from milan.core.progress import NoProgress, Progress
from milan.errors import ConfigError, DataError
from milan.evaluation.knn import Nearest
from milan.inference.collection import Collection, open_collection
from milan.inference.config import NeighboursConfig
from milan.inference.tables import check_ending, check_place, written
from milan.reporting.panels import Tile, check_apart, draw_tiles, save_picture, thumbnail

_BLOCK = 4096  # vectors compared with as many others at once: 64 MB of cosines
_PAIRS = 10  # an image, on average: more are no list that anybody reads
_FEWEST = 1000  # pairs that are always allowed
_ROUNDING = 1e-5  # cosines of equal vectors are less than 1 by so much
_WRITTEN = 8192  # rows of the list at once
_LIST = pa.schema(
    [
        ("similarity", pa.float64()),
        ("row_a", pa.int64()), ("key_a", pa.string()), ("class_a", pa.string()),
        ("row_b", pa.int64()), ("key_b", pa.string()), ("class_b", pa.string()),
        ("same_bytes", pa.bool_()),
    ]
)  # fmt: skip


def neighbours(
    where: str | NeighboursConfig = "targets.zarr",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The images of a store or of a file of embeddings that are most like one of them.

    `where` and `settings` are the command's arguments (NeighboursConfig's fields). Of a store the
    class tokens of view 0 are compared, by cosine. Returns `what` is compared, and the `query`
    and its `neighbours`, each with row, key, class and similarity; draws them (`sheet`). With
    `duplicates` it returns how many `pairs` are at least as similar as the `threshold`, or have the
    same bytes, and writes them to a `list`, the most similar first. Raises MilanError.
    """
    config = from_call(NeighboursConfig, "where", where, settings, "neighbours")
    config.check()
    check_ending(config.path, (".csv", ".parquet") if config.duplicates else (".png", ".jpg"))
    progress, device = progress or NoProgress(), pick_device(config.device)
    images = open_collection(config)
    check_apart(config.path, images.places)
    check_place(config.path)
    progress.note(f"compared: {images.what}, of {len(images.rows):,} images")
    if config.duplicates:
        return _duplicates(images, config, device, progress)
    assert config.query is not None
    position = _position(images, config.query, config.where)
    return _nearest(images, position, config, device, progress)


# --- nearest images -------------------------------------------------------------------------------


def _position(images: Collection, query: str, where: str) -> int:
    """Where the image is that `query` names. Raises DataError."""
    if query.removeprefix("-").isdecimal() and query not in images.keys:
        row = int(query)
        at = int(np.searchsorted(images.rows, row))
        if at < len(images.rows) and images.rows[at] == row:
            return at
        first, last = int(images.rows[0]), int(images.rows[-1])
        why = (
            "has no vector: its image was rejected or dropped" if first < row < last else "is none"
        )
        raise DataError(
            f"row {row} of {where} {why}",
            expected=f"a row from {first} to {last}, or a key",
            fix=f"milan neighbours {where} {first}",
        )
    if query in images.keys:
        return images.keys.index(query)
    path = Path(query)
    position = images.find_file(path) if path.is_file() else None
    if position is None:
        raise DataError(
            f"the image {query!r} is not in {where}" + ("" if path.is_file() else ", nor a file"),
            expected="a row, the key of an image, or a file with the bytes of one",
            fix=f"0, or {images.keys[0]!r}",
        )
    return position


def _nearest(
    images: Collection,
    position: int,
    config: NeighboursConfig,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    count = min(config.images, len(images.rows) - 1)
    if count < 1:
        raise DataError(
            f"{config.where} has one image only",
            expected="others to compare it with",
            fix="a store or file of more images",
        )
    nearest = Nearest(images.vector(position)[None].to(device), count + 1)
    done = 0
    progress.begin("nearest images", len(images.rows), "images")
    for vectors in images.pieces():
        positions = torch.arange(done, done + len(vectors), device=device)
        nearest.see(vectors.to(device), positions)
        done += len(vectors)
        progress.advance(done)
    progress.end()
    pairs = zip(nearest.labels[0].tolist(), nearest.similarity[0].tolist(), strict=True)
    near = [(at, cosine) for at, cosine in pairs if at != position][:count]
    pictures = images.pictures([position, *(at for at, _ in near)])
    blank = np.full((8, 8, 3), 255, np.uint8)
    tiles = [
        Tile(thumbnail(blank if pixels is None else pixels), lines)
        for pixels, lines in zip(
            pictures,
            [
                ["query", *_about(images, position)],
                *([f"{cosine:.3f}", *_about(images, at)] for at, cosine in near),
            ],
            strict=True,
        )
    ]
    lost = sum(pixels is None for pixels in pictures)
    if lost:
        progress.note(f"{lost} of {len(pictures)} pictures cannot be read any more: left white")
    title = f"nearest of {images.keys[position]}: {images.what}"
    return {
        "what": images.what,
        "query": _row(images, position, 1.0),
        "neighbours": [_row(images, at, cosine) for at, cosine in near],
        "sheet": str(save_picture(draw_tiles(title, tiles), config.path)),
    }


def _about(images: Collection, position: int) -> list[str]:
    return [images.classes[position] or "", f"{images.rows[position]}: {images.keys[position]}"]


def _row(images: Collection, position: int, cosine: float) -> dict[str, Any]:
    return {
        "similarity": round(cosine, 4),
        "row": int(images.rows[position]),
        "key": images.keys[position],
        "class": images.classes[position],
    }


# --- near-duplicates ------------------------------------------------------------------------------


def _duplicates(
    images: Collection, config: NeighboursConfig, device: torch.device, progress: Progress
) -> dict[str, Any]:
    with tempfile.TemporaryFile() as file:
        vectors = _spooled(images, file, progress)
        similar = _similar_pairs(vectors, config.threshold - _ROUNDING, device, progress)
        digests = images.digests()
        for a, b in _same_bytes(digests or []):
            similar.setdefault((a, b), float(vectors[a] @ vectors[b]))
    order = sorted(similar.items(), key=lambda item: (-item[1], item[0]))
    with written(config.path, _LIST) as table:
        for at in range(0, len(order), _WRITTEN):
            part = order[at : at + _WRITTEN]
            columns: list[Any] = [[round(min(1.0, cosine), 5) for _, cosine in part]]
            for side in (0, 1):
                at_side = [pair[side] for pair, _ in part]
                columns += [
                    images.rows[at_side],
                    [images.keys[i] for i in at_side],
                    [images.classes[i] for i in at_side],
                ]
            columns += [[digests and digests[a] == digests[b] for (a, b), _ in part]]
            table.write_table(pa.table(columns, schema=_LIST))
    return {
        "what": images.what,
        "images": len(images.rows),
        "threshold": config.threshold,
        "pairs": len(order),
        "pairs_of_the_same_bytes": None
        if digests is None
        else sum(digests[a] == digests[b] for a, b in similar),
        "images_in_pairs": len({i for pair in similar for i in pair}),
        "list": str(config.path),
    }


def _spooled(images: Collection, file: Any, progress: Progress) -> np.ndarray:
    """All vectors, float32 [m, F], in a temporary file: they are compared several times."""
    width, done = 0, 0
    progress.begin("reading", len(images.rows), "images")
    for vectors in images.pieces():
        file.write(vectors.numpy().astype(np.float32).tobytes())
        width, done = vectors.shape[1], done + len(vectors)
        progress.advance(done)
    progress.end()
    file.flush()
    return np.memmap(file, np.float32, "r", shape=(done, width))


def _similar_pairs(
    vectors: np.ndarray, threshold: float, device: torch.device, progress: Progress
) -> dict[tuple[int, int], float]:
    """(position, later position) -> cosine, of all pairs that are at least as similar.

    Raises ConfigError for more than somebody could look at.
    """
    similar: dict[tuple[int, int], float] = {}
    most = max(_FEWEST, _PAIRS * len(vectors))
    starts = range(0, len(vectors), _BLOCK)
    progress.begin("pairs", len(starts) * (len(starts) + 1) // 2, "blocks")
    done = 0

    def block(at: int) -> torch.Tensor:
        return torch.from_numpy(np.array(vectors[at : at + _BLOCK])).to(device)

    for first in starts:
        ours = block(first)
        for second in range(first, len(vectors), _BLOCK):
            theirs = ours if second == first else block(second)
            cosine = ours @ theirs.T
            if second == first:
                cosine = cosine.triu(1)  # 0, which no threshold is
            a, b = (cosine >= threshold).nonzero(as_tuple=True)
            if len(similar) + len(a) > most:
                raise ConfigError(
                    f"more than {most:,} pairs of {len(vectors):,} images have a cosine of "
                    f"{threshold + _ROUNDING:g} or more",
                    expected="few: images that are nearly the same",
                    fix=f"--threshold {1 - (1 - threshold) / 4:.4f}",
                )
            pairs = zip((a + first).tolist(), (b + second).tolist(), strict=True)
            similar |= dict(zip(pairs, cosine[a, b].tolist(), strict=True))
            done += 1
            progress.advance(done)
    progress.end()
    return similar


def _same_bytes(digests: list[str]) -> list[tuple[int, int]]:
    """(the first of images of the same bytes, another one) for all others."""
    groups: dict[str, list[int]] = defaultdict(list)
    for position, digest in enumerate(digests):
        groups[digest].append(position)
    return [(group[0], other) for group in groups.values() for other in group[1:]]
