"""The commands in documents: each is parsed by the job that it runs."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest
from commands import ROOT, check, job_commands, job_module, parser_of, shell_blocks

from fer_ray.errors import UserError

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
DOCUMENTS = ("README.md", "cluster/README.md")
"""Those with commands that run jobs."""
OTHERS = ("CONTRIBUTING.md", "results/README.md")


def commands_of(document: str) -> list[list[str]]:
    text = (ROOT / document).read_text()
    return [command for block in shell_blocks(text) for command in job_commands(block)]


@pytest.mark.parametrize("name", JOBS)
def test_every_job_gives_its_parser_without_doing_its_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser_of.cache_clear()
    job_module.cache_clear()
    assert isinstance(parser_of(name), argparse.ArgumentParser)
    assert parser_of(name).description
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_in_documents_are_ones_that_the_jobs_take(document):
    commands = commands_of(document)
    assert len(commands) > 5
    for command in commands:
        check(command)


@pytest.mark.parametrize("document", OTHERS)
def test_a_document_that_comes_to_have_commands_is_checked_too(document):
    assert not commands_of(document), f"{document} belongs to DOCUMENTS now"


def expanded_makefile() -> str:
    """The Makefile's recipes, its own variables put in, as the shell would get them."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Makefile").read_text())
    values = dict(re.findall(r"^([A-Z_]+) [:?]= (.*)$", text, re.M))
    for _ in values:  # values name others
        text = re.sub(r"\$\((\w+)\)", lambda found: values.get(found[1], found[0]), text)
    recipes = [line.strip() for line in text.splitlines() if line.startswith("\t")]
    return "\n".join(recipes).replace("$$model", "custom_cnn")  # what a loop goes over


def test_the_commands_of_the_makefile_are_ones_that_the_jobs_take():
    commands = list(job_commands(expanded_makefile()))
    assert {Path(command[0]).stem for command in commands} >= {"train", "benchmark"}
    for command in commands:
        if "--list-models" not in command:  # which prints them, and ends
            check(command)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_opens_with_a_command_that_it_takes(name):
    line = ast.get_docstring(ast.parse((ROOT / "jobs" / f"{name}.py").read_text())).splitlines()[0]
    (command,) = job_commands(line)
    assert Path(command[0]).stem == name
    check(command)


def test_the_command_that_local_py_prints_is_one_that_the_job_takes():
    text = (ROOT / "cluster" / "local.py").read_text()
    (example,) = re.findall(r'_EXAMPLE = """(.*?)"""', text, re.S)
    (command,) = job_commands(example.replace("\\\\", "\\"))
    assert "--cpus-per-worker" in command
    check(command)


def test_the_documents_show_every_job_but_the_benchmark():
    shown = {Path(command[0]).stem for name in DOCUMENTS for command in commands_of(name)}
    assert shown >= set(JOBS) - {"benchmark"}


def test_commands_are_found_in_shell():
    shell = """
    A=1 .venv/bin/python jobs/train.py --data d \\
        --run "a b"   # a comment
    ray job submit --working-dir . -- python jobs/predict.py --checkpoint $x/y && echo jobs done
    python jobs/evaluate.py --predictions p > log
    ls jobs/
    """
    assert list(job_commands(shell)) == [
        ["jobs/train.py", "--data", "d", "--run", "a b"],
        ["jobs/predict.py", "--checkpoint", "$x/y"],
        ["jobs/evaluate.py", "--predictions", "p"],
    ]
    document = "```sh\none\n```\n```toml\nno\n```\n- x\n  ```bash\n  two\n  ```\n"
    assert [block.strip() for block in shell_blocks(document)] == ["one", "two"]


@pytest.mark.parametrize(
    "wrong",
    [
        "jobs/train.py --data d --epoch 3",
        "jobs/train.py --model custom_cnn",
        "jobs/tune.py --data d --sweep normalization --seeds 0",
        "jobs/predict.py --checkpoint c --gpu",
    ],
)
def test_a_renamed_missing_or_impossible_flag_is_noticed(wrong, capsys):
    with pytest.raises(SystemExit):
        check(wrong.split())


def test_a_value_that_only_the_configuration_refuses_is_noticed():
    with pytest.raises(UserError, match="augmentation"):
        check(["jobs/train.py", "--data", "d", "--augmentation", "strongest"])
