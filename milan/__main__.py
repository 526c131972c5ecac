"""`milan` and `python -m milan`: the command line, whatever packages lie in the current folder."""

from __future__ import annotations

import os
from importlib import import_module
from threading import Timer

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
        end = Timer(_LEAVE, os._exit, (status,))
        end.daemon = True
        end.start()


if __name__ == "__main__":
    main()
