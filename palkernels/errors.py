"""How an error quotes another one."""


def one_line(error: object, *, with_type: bool = False) -> str:
    """Return what an error, or a text, says: one line of at most 500 characters.

    Args:
        with_type: whether the error's class stands before its message. Where there is no message the class stands
            alone, in any case.
    """
    message, name = " ".join(str(error).split()), type(error).__name__
    line = f"{name}: {message}" if with_type and message else message or name
    return line if len(line) <= 500 else line[:497] + "..."
