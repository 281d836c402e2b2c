"""The image for nodes and pods: linted, without privileges, installed from the lock."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).parent / "hadolint"


def lint(text: str) -> str:
    """hadolint's messages, those about style included."""
    if not HADOLINT.exists():
        pytest.skip("hadolint is absent")
    command = [str(HADOLINT), "--no-color", "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).stdout


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of a name, in order."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    return re.findall(rf"^{name} +(.*)$", joined, re.M)


def test_hadolint_reports_nothing():
    assert lint(DOCKERFILE) == ""


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (("python:${PYTHON}-slim-bookworm AS cpu", "python:latest AS cpu"), "DL3007"),
        (("USER 1000:1000", "USER root"), "DL3002"),
        (("COPY fer_ray", "ADD fer_ray"), "DL3020"),
        (("--no-install-recommends ", ""), "DL3015"),
    ],
)
def test_hadolint_reports_errors(change, rule):
    assert change[0] in DOCKERFILE
    assert rule in lint(DOCKERFILE.replace(*change))


def test_nothing_runs_as_root_and_the_base_has_a_version():
    assert instructions("USER") == ["1000:1000"]
    version = dict(one.split("=") for one in instructions("ARG"))["PYTHON"]
    assert re.fullmatch(r"3\.11\.\d+", version), "as in the images of aws.yaml and gcp.yaml"
    bases = {one.split()[0] for one in instructions("FROM")}
    assert bases == {"python:${PYTHON}-slim-bookworm", "cpu", "${VARIANT}"}


def test_dependencies_are_installed_from_the_lock_with_hashes():
    (install,) = (one for one in instructions("RUN") if "pip install" in one)
    assert "--require-hashes --requirement /tmp/requirements.lock" in install
    assert "requirements.lock /tmp/requirements.lock" in instructions("COPY")


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether docker excludes a path: the last pattern that matches it, or a parent, decides."""
    parts = path.split("/")
    above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    excluded = False
    for pattern in patterns:
        name = pattern.removeprefix("!")
        names = {name, name.removeprefix("**/")}
        if any(fnmatch.fnmatch(one, each) for one in (*above, *parts) for each in names):
            excluded = not pattern.startswith("!")
    return excluded


def test_docker_sees_only_the_files_that_are_copied():
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    copied = [one.split()[0] for one in instructions("COPY") if not one.startswith("--from")]
    assert sorted(copied) == ["fer_ray", "jobs", "requirements.lock"]
    for name in copied:
        assert (ROOT / name).exists() and not ignored(name, patterns)
    assert not ignored("jobs/train.py", patterns)
    for name in (
        ".venv",
        ".git/config",
        "results/runs/x",
        "fer_ray/__pycache__/cli.pyc",
        "README.md",
    ):
        assert ignored(name, patterns), name


def test_the_manifests_run_the_images_that_the_dockerfile_builds():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    built = set(re.findall(r"--build-arg VARIANT=(\w+) --tag (\S+)", DOCKERFILE))
    name = f"registry.example.com/fer_ray:{version}"
    assert built == {("cpu", f"{name}-cpu"), ("cuda", f"{name}-cuda")}
    stages = {one.split(" AS ")[1] for one in instructions("FROM") if " AS " in one}
    assert {variant for variant, _ in built} <= stages
    for file in (CLUSTER / "kuberay").glob("*.yaml"):
        used = set(re.findall(r"image: (\S+)", file.read_text()))
        assert used <= {tag for _, tag in built}, file.name
