"""What the jobs share on the command line: one-line errors, progress, starting Ray."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from fer_ray.errors import UserError, unknown

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


class JobParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage block; exit status 2."""

    def __init__(self, **settings: object) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **settings,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_STATUS, f"{self.prog}: {message}\n")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parses, and refuses unknown flags with the nearest known one."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [flag for action in self._actions for flag in action.option_strings]
            first = rest[0].split("=")[0]
            if first.startswith("-"):
                self.error(str(unknown("unknown flag", first, flags)))
            self.error(f"{rest[0]!r} does not follow a flag")
        return parsed


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argument type: a whole number within bounds, both included."""
    allowed = f">= {minimum}" if maximum is None else f"between {minimum} and {maximum}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None  # type: ignore[assignment]
        if value is None or value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
        return value

    return convert


def run(main: Callable[[], None]) -> None:
    """Runs a job: a `UserError` becomes one line and status 2, an interrupt status 130."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)  # noqa: PTH119
        sys.exit(USER_ERROR_STATUS)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)


def say(message: str) -> None:
    """Prints one line of progress at once, also where standard output is a pipe."""
    print(message, flush=True)


def start_ray(**settings: object) -> None:
    """Connects to the cluster that submitted this job, or starts one on this machine.

    An environment that names a cluster (``RAY_ADDRESS``, set by ``ray job submit``) is obeyed;
    otherwise a cluster of this machine alone is started, so that a stale one which happens to
    be found is never joined by accident. Does nothing where Ray is initialized already.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    import ray  # takes a second: not before the arguments are known to be right

    if ray.is_initialized():
        return
    if not os.environ.get("RAY_ADDRESS"):
        settings = {"address": "local", "include_dashboard": False, **settings}
    ray.init(log_to_driver=True, **settings)
    resources = ray.cluster_resources()
    say(
        f"ray {ray.__version__}: {len(ray.nodes())} node(s), {resources.get('CPU', 0):g} CPUs, "
        f"{resources.get('GPU', 0):g} GPUs"
    )
