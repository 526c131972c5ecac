"""`milan` and `python -m milan`: the command line, whatever packages lie in the current folder."""

from __future__ import annotations

from importlib import import_module

from milan.core.beside import ours

COMMANDS = "stages.cli"


def main() -> None:
    """Run the command line."""
    with ours():
        import_module(COMMANDS).main()


if __name__ == "__main__":
    main()
