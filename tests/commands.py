"""The commands that run jobs in documents and manifests, found and read as the jobs do."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fer_ray.config import flags

ROOT = Path(__file__).resolve().parents[1]
JOB = re.compile(r"(?:^|/)jobs/(\w+)\.py$")
_END = {"&&", "||", "|", ";", "&", ">", ">>", ")", "done"}


@cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """A new job's parser, from the file alone: nothing is run but its definitions."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec and spec.loader, f"there is no jobs/{name}.py"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_parser()


def shell_blocks(document: str) -> Iterator[str]:
    """The fenced blocks of shell in a Markdown document."""
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", document, re.M | re.S):
        if language in ("sh", "bash", "console"):
            yield block


def job_commands(shell: str) -> Iterator[list[str]]:
    """Each command in a piece of shell that runs a job: the job's file and what follows it.

    Lines that end in a backslash go on; comments end; a command ends where the shell ends it.
    """
    for line in re.sub(r"\\\n", " ", shell).splitlines():
        if "jobs/" not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for start, word in enumerate(words):
            if JOB.search(word):
                assert start and "python" in words[start - 1], f"what runs {word}? {line.strip()}"
                ends = (at for at in range(start, len(words)) if words[at] in _END)
                yield words[start : next(ends, len(words))]


def check(command: list[str]) -> argparse.Namespace:
    """Parses a command as its job would, values of the training's configuration included.

    Raises:
        SystemExit: what a user would get for it: an unknown flag, a value out of its range.
        UserError: a value that the configuration refuses.
    """
    found = JOB.search(command[0])
    assert found, command
    arguments = parser_of(found[1]).parse_args(command[1:])
    if "model.name" in vars(arguments):
        flags.config_from_flags(arguments, data=arguments.data or "data")
    return arguments
