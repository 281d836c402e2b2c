"""Finds the commands that run jobs in documents and manifests, and parses them as the jobs do."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from fer_ray.config import flags

ROOT = Path(__file__).resolve().parents[1]
JOB = re.compile(r"(?:^|/)jobs/(\w+)\.py$")
_END = {"&&", "||", "|", ";", "&", ">", ">>", ")", "done"}


@cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """A job's parser."""
    return job_module(name).build_parser()


@cache
def job_module(name: str) -> ModuleType:
    """A job's file, imported; the job does not run."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec and spec.loader, f"there is no jobs/{name}.py"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shell_blocks(document: str) -> Iterator[str]:
    """The fenced blocks of shell in a Markdown document."""
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", document, re.M | re.S):
        if language in ("sh", "bash", "console"):
            yield block


def job_commands(shell: str) -> Iterator[list[str]]:
    """The words of each command in a shell text that runs a job, from the job's file on.

    A backslash at the end of a line continues it, and comments are skipped.
    """
    for line in re.sub(r"\\\n", " ", shell).splitlines():
        if "jobs/" not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for start, word in enumerate(words):
            if JOB.search(word):
                assert start and "python" in words[start - 1], (
                    f"{word} is not run by Python: {line.strip()}"
                )
                ends = (at for at in range(start, len(words)) if words[at] in _END)
                yield words[start : next(ends, len(words))]


def check(command: list[str]) -> argparse.Namespace:
    """Parses a command as its job does, values of the training's configuration included.

    Raises:
        SystemExit: for an unknown flag, or a value out of its range.
        UserError: for a value that the configuration refuses.
    """
    match = JOB.search(command[0])
    assert match, command
    arguments = parser_of(match[1]).parse_args(command[1:])
    if "model.name" in vars(arguments):
        flags.config_from_flags(arguments, data=arguments.data or "data")
    return arguments
