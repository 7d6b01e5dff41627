"""Errors that a user of the command caused and can mend."""

__all__ = ["UserError", "one_line"]


class UserError(ValueError):
    """A mistake of the user. The command prints the message as one line and exits with code 2."""


def one_line(error: BaseException) -> str:
    """Return the message of another library's error as one line of at most 500 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:497] + "..."
