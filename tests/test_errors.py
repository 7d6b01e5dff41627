"""How an error is quoted by another one."""

import pytest

from palkernels.errors import one_line


@pytest.mark.parametrize(
    ("error", "with_type", "line"),
    [
        (ValueError("no\n  such   file "), False, "no such file"),
        (ValueError("no\n  such   file "), True, "ValueError: no such file"),
        (KeyError(), False, "KeyError"),
        (KeyError(), True, "KeyError"),
        ("two\nlines", False, "two lines"),
        ("x" * 500, False, "x" * 500),
        ("x" * 501, False, "x" * 497 + "..."),
    ],
)
def test_one_line(error, with_type, line):
    assert one_line(error, with_type=with_type) == line
