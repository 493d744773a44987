"""The entry point: runs the command line, and turns an engine's error into one line and an exit status."""

from __future__ import annotations

import sys

from ..protocol.errors import EngineError


def main() -> None:
    """`fast-inference`. Exit status: 0; 1 after an `EngineError`; 2 for arguments that can't be; 130 after Ctrl-C."""
    from .cli import app

    try:
        app()
    except EngineError as error:
        red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{red}error: {error}{plain}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
