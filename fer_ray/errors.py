"""Exceptions whose message is for the user: one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error the user can correct: one line that says what is wrong, where, and what is allowed.

    Jobs print it on standard error and exit with status 2. `JobFailed` and `OSError` exit with
    status 1; every other exception is a defect of this project and keeps its traceback.
    """


def unknown(what: str, name: object, allowed: Iterable[str]) -> UserError:
    """Builds the error for a name that is not among the allowed ones.

    Args:
        what: what the name is for, such as ``--model``.
        name: the name that was not recognized.
        allowed: every name that is accepted.

    Returns:
        The error to raise; it lists the allowed names and the most similar one.
    """
    return UserError(f"{what}: {not_one_of(name, allowed)}")


def not_one_of(name: object, allowed: Iterable[str]) -> str:
    """Why a name is refused: the allowed names, and the nearest of them."""
    names = list(allowed)
    similar = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {similar[0]!r}?)" if similar else ""
    return f"{str(name)!r} is not one of {', '.join(names)}{hint}"


class JobFailed(RuntimeError):
    """The input was right but the work failed: one line, exit status 1."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """A text with control characters, lone surrogates and the like as escapes, such as ``\\x1b``.

    What a file's name or a label holds could otherwise move a terminal's cursor, or end a job that
    prints to a file of another encoding.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
