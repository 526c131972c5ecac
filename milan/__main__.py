"""`milan` and `python -m milan`: the command line, whatever packages lie in the current folder."""

from __future__ import annotations

import os
from importlib import import_module
from threading import Timer, main_thread

from milan.core.beside import ours

COMMANDS = "stages.cli"
_LEAVE = 60.0  # seconds in which a process that has done its work has to end


def main() -> None:
    """Run the command line, and end, although one of its threads may stand still in a read."""
    code: object = 1
    try:
        with ours():
            code = import_module(COMMANDS).main()
    except SystemExit as left:
        code = left.code
        raise
    finally:
        status = code if isinstance(code, int) else int(code is not None)
        end = Timer(_LEAVE, _leave, (status,))
        end.daemon = True
        end.start()


def _leave(status: int) -> None:
    """End this process, if it is about to: Python's main thread is over then."""
    if not main_thread().is_alive():
        os._exit(status)


if __name__ == "__main__":
    main()
