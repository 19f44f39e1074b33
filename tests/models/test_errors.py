"""One line of a library's error."""

import pytest

from unlocked.models.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("one\ntwo"), "one"),
        (RuntimeError("\n  one  \ntwo"), "one  "),
        (RuntimeError(), "RuntimeError"),
        (KeyError("x"), "'x'"),
        (ValueError(" \n"), "ValueError"),
        (RuntimeError("x" * 1000), "x" * 240),
    ],
)
def test_the_first_line_says_what_is_wrong(error: Exception, line: str) -> None:
    assert first_line(error) == line
