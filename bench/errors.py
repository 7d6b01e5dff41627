"""The error that a user of the command caused and can mend."""

__all__ = ["UserError", "one_line"]


class UserError(ValueError):
    """The command prints the message as one line and exits with code 2."""


def one_line(error: BaseException) -> str:
    """An error of another library, short enough to stand inside a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:497] + "..."
