"""`milan export`: a network in the form of another library, with its card."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from milan.core.atomic import cannot_write, sync_folder
from milan.core.config_resolver import from_call
from milan.core.progress import NoProgress, Progress
from milan.errors import ConfigError
from milan.exchange.card import model_card
from milan.exchange.config import ExportConfig
from milan.exchange.formats import WRITERS
from milan.exchange.source import open_source

CARD = "README.md"


def export(
    checkpoint: str | ExportConfig = "runs/pretrain",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write the network of a run as another library opens it: weights, configuration, model card.

    `checkpoint` and `settings` are the command's arguments (ExportConfig's fields). The folder
    `out` appears whole or not at all. Returns what was written. Raises ConfigError for a format
    that has no place for the network, and for a folder that exists.
    """
    config = from_call(ExportConfig, "checkpoint", checkpoint, settings, "export")
    config.check()
    progress, out = progress or NoProgress(), Path(config.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(
            f"{out} exists", expected="a new folder", fix="--out another one, or remove it"
        )
    source = open_source(config.checkpoint, config.size)
    if source.said:
        progress.note(f"{config.checkpoint} was read {source.said}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise _refused(out, error) from None
    try:
        written = WRITERS[config.format](source, made)
        name = out.absolute().name
        card = model_card(source, written, format=config.format, name=name)
        (made / CARD).write_text(card, encoding="utf-8")
        made.chmod(0o777 & ~_umask())
        for file in made.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(made, out)
        sync_folder(out.parent)
    except OSError as error:
        raise _refused(out, error) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    for note in written.notes:
        progress.note(note)
    files = sorted(file for file in out.iterdir() if file.is_file())
    return {
        "checkpoint": config.checkpoint, "format": config.format, "folder": str(out),
        "network": "classifier" if source.classes else "encoder", "model": source.model,
        "size": source.size, "files": {file.name: file.stat().st_size for file in files},
        "use": written.use.replace("FOLDER", str(out)),
    }  # fmt: skip


def _refused(out: Path, error: OSError) -> Exception:
    """A ConfigError for a folder that cannot be written, or the error itself."""
    known = cannot_write(out.absolute().parent, error)
    return ConfigError(known[0], fix=known[1]) if known else error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
