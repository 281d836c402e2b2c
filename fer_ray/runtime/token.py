"""The token that keeps other users out of a Ray cluster that a job starts for itself.

Ray's processes listen on all addresses of a machine, and whoever may submit work runs code as this
user. Ray asks for a token, which it would write to ``~/.ray/auth_token``, readable by all users.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
from collections.abc import Iterator

_VARIABLE = "RAY_AUTH_TOKEN"
_CHOICES = (_VARIABLE, "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
"""Environment variables by which a user has decided already."""


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Gives the cluster that is started in the block a token which is in no file.

    Only its own processes know it, from their environment, which other users cannot read.
    """
    if any(name in os.environ for name in _CHOICES):
        yield
        return
    os.environ[_VARIABLE] = _token()
    try:
        yield
    finally:
        # jobs that this process starts may connect to another cluster, by another token
        del os.environ[_VARIABLE]


@functools.cache
def _token() -> str:
    """One for all clusters that this process starts: Ray reads it only once."""
    return secrets.token_hex(32)
