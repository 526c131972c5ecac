"""Errors of the machine (memory, disk, folder, open files), as one line that says what to do."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from milan.core.atomic import cannot_write
from milan.errors import TrainError

_RESUME = "the same line goes on from the last checkpoint"


@contextmanager
def as_train_error(run: Path, micro_batch: int | None) -> Iterator[None]:
    """Inside, an error because memory or open files are used up, or the run cannot be written,
    becomes a TrainError.

    `micro_batch` is how many images were on the device at once. Any other error stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _no_memory(error, "device", micro_batch) from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise TrainError(
                f"{error.strerror}: {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} are allowed",
                expected="some for each loader worker",
                fix=f"ulimit -n 4096, or a smaller --num-workers; {_RESUME}",
            ) from None
        reason = cannot_write(run, error)
        if reason is None:
            raise
        expected = "a folder that takes the log and the checkpoints"
        raise TrainError(reason[0], expected=expected, fix=reason[1]) from None
    except RuntimeError as error:  # torch has no finer one for the CPU's memory
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise _no_memory(error, "machine", micro_batch) from None
        raise


def _no_memory(error: RuntimeError, where: str, micro_batch: int | None) -> TrainError:
    images = micro_batch or 1
    fewer = next((m for m in range(images // 2, 0, -1) if images % m == 0), 1)
    return TrainError(
        f"the {where}'s memory is full ({_first_line(str(error))})",
        expected=f"room for {images} images at once",
        fix=f"--set micro_batch={fewer}, which changes no batch, or "
        f"--set checkpoint_activations=true; {_RESUME}",
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no details"
