"""Errors that a user of the command caused and can mend."""

from palkernels.errors import one_line

__all__ = ["UserError", "one_line"]


class UserError(ValueError):
    """A mistake of the user. The command prints the message as one line and exits with code 2."""
