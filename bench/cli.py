"""The command `palkernels`: how it starts, and how it ends."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from palkernels import lazy
from palkernels.bench import process
from palkernels.bench.errors import UserError

if TYPE_CHECKING:
    from palkernels.bench.commands import app
else:
    __getattr__, __dir__ = lazy.exports(__name__, {"app": "palkernels.bench.commands"})

__all__ = ["app", "main"]

# Where a program does nothing but run the command, as the one that pip installs, the signals are ours from here on.
if os.path.basename(sys.argv[0]) in ("palkernels", "-c") and process.is_the_program(sys._getframe()):
    process.take_signals()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command. A mistake of the user is one line on stderr and exit code 2, Ctrl-C 130."""
    if process.is_the_program(sys._getframe()):
        process.take_signals()
    process.write_to_any_terminal()
    # peft imports it where it is installed, and it warns of a kernel for 4-bit weights that no command uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    code, message = 1, None
    try:
        code, message = _run((sys.argv[1:] if arguments is None else arguments) or ["--help"])
    except BaseException:  # of which a signal may be the cause, whatever it has become on its way
        if process.signal_seen() is None:
            raise
    if (ending := process.signal_seen()) is not None:
        message, code = ending
    process.exit_with(code, message)


def _run(words: list[str]) -> tuple[int, str | None]:
    """Run a command and return its exit code, and what went wrong."""
    try:
        from palkernels.bench.commands import app  # typer takes a while

        result = app(args=words, prog_name="palkernels", standalone_mode=False)
    except KeyboardInterrupt:
        result = process.INTERRUPTED
    except UserError as error:
        return 2, str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("palkernels"):
            raise
        return 2, f"{error.name} must be installed: pip install 'palkernels[bench]'"
    except Exception as error:
        # Some versions of typer raise classes of their own, others click's; an error meant for users has a message.
        describe = getattr(error, "format_message", None)
        if type(error).__name__ == "Abort":
            result = process.INTERRUPTED
        elif describe is None:
            raise
        else:
            return 2, str(describe())
    if result == process.INTERRUPTED:  # typer returns it by itself, and silently
        return process.INTERRUPTED, "interrupted"
    return (result if isinstance(result, int) else 0), None


if __name__ == "__main__":  # python -m palkernels.bench.cli, as launchers of several processes take it
    main()
