"""`milan embed`: features of any images by a frozen network, in one file for other tools.

What is computed is kept as evaluations keep it (milan.evaluation.features): whole files of some
rows, so whoever is killed goes on, and pooled features are computed once for embeddings and
protocols. The file that was asked for is written from them at the end, piece by piece.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from milan.core.atomic import digest_of
from milan.core.config_resolver import from_call
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.core.units import format_bytes
from milan.core.waiting import Stopped
from milan.errors import ConfigError, DataError
from milan.evaluation.features import Context, Features, features_folder, features_of
from milan.evaluation.frozen import Frozen, frozen_encoder
from milan.evaluation.ranks import on_ranks
from milan.evaluation.splits import LabelledSet, open_images
from milan.images.manifest import resolve_data
from milan.inference.config import EmbedConfig
from milan.inference.embeddings import (
    COLUMN,
    ENDINGS,
    Embeddings,
    Piece,
    read_about,
    rows_file,
    write_npy,
    write_parquet,
    write_rows,
)
from milan.inference.tables import check_ending, check_place, replaced
from milan.reporting.panels import check_apart
from pipeline.teachers.frozen import frozen_teacher
from pipeline.writing.shards import write_array

_FILE_BYTES = 128 << 20  # of patches in a file that is kept until all are there


def embed(
    checkpoint: str | EmbedConfig = "runs/pretrain",
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write the features of images to a file: class token, mean of patches, or all patches.

    `checkpoint` and `settings` are the command's arguments (EmbedConfig's fields). With several
    GPUs it starts a rank for each. Called again it goes on; a file that is there already is left
    as it is. Returns figures; ranks after the first return {}. Asked to stop, or by SIGINT, SIGTERM
    or SIGUSR1, it returns {"stopped_by": signal}. Raises MilanError.
    """
    config = from_call(EmbedConfig, "checkpoint", checkpoint, settings, "embed")
    config.check()
    check_ending(Path(config.out), ENDINGS)
    return on_ranks(partial(_embed, config), config, stop=stop, progress=progress)


def _embed(config: EmbedConfig, context: Context) -> dict[str, Any]:
    began, out, ranks = time.perf_counter(), Path(config.out), context.ranks
    evaluation = config.evaluation()
    load = frozen_teacher if config.checkpoint == "teacher" else frozen_encoder
    frozen = load(evaluation, context.device)
    shape = _shape_of(frozen, config.pooling, context.device)
    images = ranks.on_rank0(lambda: open_images(evaluation, context.progress))
    images.beside.check(frozen.channels)
    source = resolve_data(config.data, config.data_root)
    ranks.on_rank0(lambda: check_apart(out, [source]))
    ranks.on_rank0(lambda: check_place(out, folder=True))
    about = {
        "checkpoint": frozen.name,
        "pooling": config.pooling,
        "dtype": config.dtype,
        "crop_share": config.crop_share,
        "images": images.identity_for(frozen.channels),
        "network": frozen.identity,
    }
    about["digest"] = digest_of(about)  # of what determines the embeddings
    about |= {"data": str(source.resolve()), "split": config.split}
    if ranks.on_rank0(lambda: _is_there(out, about)):
        context.progress.note(f"nothing is left to do: {out} holds these embeddings")
        return _figures(out, began)
    ranks.on_rank0(lambda: _check_room(out, (len(images.labels), *shape), config.dtype))
    with ExitStack() as kept:
        if config.pooling == "patches":
            folder, frozen = Path(f"{config.out}.parts"), _of_patches(frozen, config.dtype)
            numbers = shape[0] * shape[1] * (2 if config.dtype == "float16" else 4)
            rows: int | None = max(1, _FILE_BYTES // numbers)
        else:
            folder, rows = kept.enter_context(features_folder(evaluation, frozen, context)), None
        features = features_of(frozen, images, folder, evaluation, context, file_rows=rows)
        about["shape"] = [len(features.rows), *shape]
        ranks.on_rank0(lambda: _write(out, features, images, about, context))
        if config.pooling == "patches" and ranks.is_rank0:
            shutil.rmtree(folder, ignore_errors=True)
    if features.rejected:
        context.progress.note(
            f"rejected files: {len(features.rejected)}, the first is {features.rejected[0]}"
        )
    return _figures(out, began) | {"rejected_images": len(features.rejected)}


def _is_there(out: Path, about: dict[str, Any]) -> bool:
    """Whether the file has been written already. Raises ConfigError if it is another one."""
    there = read_about(out)
    if there and there["digest"] == about["digest"] and out.exists():
        with suppress(DataError):
            Embeddings(out)
            return True
        if out.is_dir():
            shutil.rmtree(out)
        return False  # it is damaged: it is written again
    if out.exists():
        names = ("checkpoint", "pooling", "dtype", "crop_share", "images", "network")
        differs = [name for name in names if there and there.get(name) != about[name]]
        raise ConfigError(
            f"{out} is there already"
            + (f", with other embeddings ({', '.join(differs)})" if there else ""),
            expected="a name that is free",
            fix=f"--out {out.with_stem(out.stem + '-2')}, or remove it",
        )
    return False


def _check_room(out: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Before anything is computed. Raises DataError if the disk is too small."""
    count = torch.Size(shape).numel() * (2 if dtype == "float16" else 4)
    if count > (free := shutil.disk_usage(out.parent).free):
        raise DataError(
            f"{out} takes {format_bytes(count)}, and {out.parent} has room for "
            f"{format_bytes(free)}",
            expected="room for all embeddings, beside the features that they are made from",
            fix="--out on a larger disk",
        )


def _figures(out: Path, began: float) -> dict[str, Any]:
    about = read_about(out) or {}
    return {
        "embeddings": str(out),
        "keys and labels": str(rows_file(out)),
        "images": about["shape"][0],
        "shape": " x ".join(map(str, about["shape"])),
        "dtype": about["dtype"],
        "of": f"{about['pooling']} of {about['checkpoint']}",
        "seconds": round(time.perf_counter() - began, 1),
    }


# --- what is computed -----------------------------------------------------------------------------


def _shape_of(frozen: Frozen, pooling: str, device: torch.device) -> tuple[int, ...]:
    """(F,) or (N, F): of what one image gives. Raises ConfigError for what the network lacks."""
    assert frozen.tokens is not None
    with torch.inference_mode():
        first, patches = frozen.tokens(frozen.blank(device))
    if pooling == "token" and first is None:
        raise ConfigError(
            f"{frozen.name} has no class token",
            expected="an encoder with one",
            fix="--pooling mean",
        )
    return tuple(patches.shape[1:]) if pooling == "patches" else (patches.shape[2],)


def _of_patches(frozen: Frozen, dtype: str) -> Frozen:
    """The network whose features are its patches, [B, N F] of `dtype`."""
    tokens, kind = frozen.tokens, getattr(torch, dtype)
    assert tokens is not None
    identity = None if frozen.identity is None else frozen.identity | {
        "features": "patches", "dtype": dtype
    }  # fmt: skip
    return replace(
        frozen, identity=identity, features=lambda pixels: tokens(pixels)[1].flatten(1).to(kind)
    )


# --- the file -------------------------------------------------------------------------------------


def _write(
    out: Path, features: Features, images: LabelledSet, about: dict[str, Any], context: Context
) -> None:
    """Write the file from the features that are kept. Raises DataError if it cannot be."""
    shape, dtype = tuple(about["shape"]), about["dtype"]
    context.progress.begin(f"writing {out.name}", shape[0], "images")
    pieces = _pieces(features, images, about, context)
    ending = out.suffix.lower()
    if ending == ".parquet":
        write_parquet(out, pieces, about)
    elif ending == ".npy":
        write_npy(out, pieces, about)
    else:
        with replaced(out) as part:
            values = write_rows(part / "rows.parquet", pieces, about)
            write_array(part, COLUMN, shape, dtype, values)
    context.progress.end()


def _pieces(
    features: Features, images: LabelledSet, about: dict[str, Any], context: Context
) -> Iterator[Piece]:
    """The rows of the file, those of some images at once. Raises Stopped."""
    width, done = about["shape"][-1], 0
    for values, rows in features.pieces(range(len(features))):
        if context.stop.by:
            raise Stopped(context.stop.by)
        if not len(rows):
            continue
        # Pooled features are class token and mean of patches, without class token the mean alone.
        if about["pooling"] == "token":
            values = values[:, :width]
        elif about["pooling"] == "mean":
            values = values[:, -width:]
        labels = [label if label >= 0 else None for label in images.labels[rows].tolist()]
        names = images.names
        yield Piece(
            images.keys.take(rows).to_pylist(),
            labels,
            [names[label] if names and label is not None else None for label in labels],
            values.numpy().astype(about["dtype"]).reshape(len(rows), *about["shape"][1:]),
        )
        done += len(rows)
        context.progress.advance(done)
