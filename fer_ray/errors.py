"""The exceptions whose message is for the user: one line, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the caller can mend: one line that says what, where and what is allowed.

    Jobs print it on standard error and exit with status 2; every other exception is a defect
    of this project and keeps its traceback.
    """


def unknown(what: str, given: object, allowed: Iterable[str]) -> UserError:
    """Builds the error for a name that is not among the allowed ones.

    Args:
        what: what the name is for, such as ``--model``.
        given: what was given.
        allowed: every name that would have been accepted.

    Returns:
        The error to raise; it lists the allowed names and the nearest one.
    """
    return UserError(f"{what}: {not_one_of(given, allowed)}")


def not_one_of(given: object, allowed: Iterable[str]) -> str:
    """Why a name is refused: the allowed names, and the nearest of them."""
    names = list(allowed)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{str(given)!r} is not one of {', '.join(names)}{hint}"


class JobFailed(RuntimeError):
    """A job whose input was right but whose work failed: one line, exit status 1."""


def first_line(error: BaseException) -> str:
    """What an exception says, as one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
