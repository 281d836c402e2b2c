"""What the jobs share on the command line: one-line errors, progress messages, starting Ray."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fer_ray import storage
from fer_ray.errors import JobFailed, UserError, printable, unknown
from fer_ray.runtime import termination

FAILED_STATUS = 1
USER_ERROR_STATUS = 2


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one, 0 included."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


class JobParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage block; exit status 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_STATUS, f"{self.prog}: {printable(message)}\n")

    def parse_args(self, args=None, namespace=None):
        """Parses the arguments; an unknown flag ends the job with the nearest known one."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [flag for action in self._actions for flag in action.option_strings]
            first = rest[0].split("=")[0]
            if first.startswith("-"):
                self.error(str(unknown("unknown flag", first, flags)))
            self.error(f"{rest[0]!r} stands alone: values follow a flag")
        for action in self._actions:  # of --flag=-- argparse makes an empty list
            if action.nargs is None and isinstance(getattr(parsed, action.dest, None), list):
                self.error(f"{action.option_strings[0]}: a value is missing")
        return parsed


class ListModels(argparse.Action):
    """A flag that prints parameters and multiply-adds of every model and setting, then exits."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        from fer_ray.models import registry

        print(f"{'model':26}{'input':>8}{'parameters':>14}{'multiply-adds':>16}")
        for name, size, cost in registry.variants():
            print(f"{name:26}{size:>5} px{cost.parameters:>14,}{cost.multiply_adds:>16,}")
        parser.exit()


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argument type: a whole number within bounds, both included."""
    allowed = f">= {minimum}" if maximum is None else f"between {minimum} and {maximum}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
        return value

    return convert


def number(above: float, maximum: float | None = None) -> Callable[[str], float]:
    """An argument type: a finite number above a bound, and at most another."""
    allowed = f"above {above:g}" + ("" if maximum is None else f", at most {maximum:g}")

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (above < value < math.inf and (maximum is None or value <= maximum)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {allowed}")
        return value

    return convert


def winner_of(sweep: str | None) -> tuple[str | None, dict[str, Any] | None]:
    """The name for the run of a sweep's winner and its settings; None and None without a sweep.

    Args:
        sweep: the sweep's folder, as given with ``--from-sweep``.

    Raises:
        UserError: where the folder is no sweep, or has no winner.
    """
    if not sweep:
        return None, None
    from fer_ray.sweeps import summary

    return summary.read_winner(sweep)


def run(main: Callable[[], None], *, first_line: str = "") -> None:
    """Runs a job and turns expected errors into one line on standard error and an exit status.

    Args:
        main: the job.
        first_line: printed before the job imports what takes seconds, unless it was only asked
            for help or a list.

    Status 2: `UserError`, or a bucket that does not exist or is not open to this user. Status 1:
    `JobFailed`, or another `OSError` of the disk, the network or the storage. Status 130 or 143:
    SIGINT or SIGTERM. Other exceptions are defects of this project and keep their traceback.
    """
    gc.set_threshold(_GC_THRESHOLD)
    with termination.handling(_program()):
        try:
            if first_line and not _PRINTS_AND_EXITS & {*sys.argv}:
                log(first_line)
            main()
        except UserError as error:
            _end(error, USER_ERROR_STATUS)
        except JobFailed as error:
            _end(error, FAILED_STATUS)
        except OSError as error:
            _end(error, USER_ERROR_STATUS if storage.is_refusal(error) else FAILED_STATUS)
        except KeyboardInterrupt:
            termination.end()


_GC_THRESHOLD = 50_000
"""Objects between runs of the garbage collector: with Python's 700 it takes a fifth of the time in
which torch is imported."""
_PRINTS_AND_EXITS = {"-h", "--help", "--list-models"}
"""Flags of jobs that only print something."""


def _end(reason: object, status: int) -> NoReturn:
    sys.stdout.flush()
    line = (str(reason) or repr(reason)).splitlines()[0]
    print(f"{_program()}: {printable(line)}", file=sys.stderr)
    sys.exit(status)


def _program() -> str:
    return Path(sys.argv[0]).name


def log(message: str) -> None:
    """Prints progress at once, also where standard output is a pipe; lines stay lines."""
    print("\n".join(map(printable, message.split("\n"))), flush=True)


def conclude(path: str) -> None:
    """Shuts Ray down, then prints the path of the job's result as the last line."""
    if _started:
        import ray

        time.sleep(_LAST_LINES_S)
        ray.shutdown()
    log(path)


_LAST_LINES_S = 0.5
"""Seconds that lines printed by workers may take to reach the driver."""
_started: list[bool] = []
"""Not empty where this process started Ray or connected to it, and has to disconnect."""


def lasting(flag: str, path: str) -> str:
    """Returns an output's place, unless it would lie in the copy that Ray made for a job.

    ``ray job submit --working-dir`` runs a job in a copy of the folder, which Ray may delete.

    Raises:
        UserError: for a relative path in such a job.
    """
    if (
        not storage.is_uri(path)
        and not path.startswith(("/", "~"))
        and "_ray_pkg_" in str(Path.cwd())
    ):
        raise UserError(
            f"{flag}: {path} would lie in Ray's temporary copy of the working directory; "
            "give submitted jobs an absolute path or a URI"
        )
    return path


def start_ray(**settings: Any) -> None:
    """Connects to the cluster that ``RAY_ADDRESS`` names, or starts one on this machine.

    ``ray job submit`` sets that variable. Without it a new cluster is started even where another
    one runs on the machine, so that no job joins a stale cluster by accident. Does nothing where
    Ray is initialized already.

    Args:
        settings: further arguments of `ray.init`.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray Train polls the workers' reports at this interval (default 2 s): short epochs wait for it
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines of progress look alike
    # otherwise each printed line appears twice, and so does each report with all its metrics
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    log(f"connecting to Ray at {address}" if address else "starting Ray")
    import ray  # takes a second: only after the arguments have been checked

    if ray.is_initialized():
        return
    if not address:
        # this machine is not preempted: saves a process
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        settings = {"address": "local", "include_dashboard": False, **settings}
    from fer_ray.runtime import ray_compat, token

    try:
        with contextlib.ExitStack() as stack:
            if settings.get("address") == "local":
                termination.own_ray()
                stack.enter_context(token.private())
                stack.enter_context(ray_compat.any_agent_port())
            ray.init(log_to_driver=True, logging_level=logging.ERROR, **settings)
    except SystemExit as error:  # what Ray makes of SIGTERM
        termination.terminated()
        raise KeyboardInterrupt from error
    termination.install()
    _started.append(True)
    resources = ray.cluster_resources()
    log(
        f"ray {ray.__version__}: {len(ray.nodes())} node(s), {resources.get('CPU', 0):g} CPUs, "
        f"{resources.get('GPU', 0):g} GPUs"
    )
