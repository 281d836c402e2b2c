"""The errors that cluster/README.md describes, reproduced on two nodes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cluster import ROOT, Cluster, cluster, nodes  # noqa: F401 (the fixture)

RAY = Path(sys.executable).parent / "ray"


def quoted(message: str) -> str:
    """A message that the README quotes."""
    text = " ".join((ROOT / "cluster" / "README.md").read_text().split())
    assert message in text, "cluster/README.md does not quote it"
    return message


def ray_job(cluster: Cluster, *arguments: str, **environment: str) -> str:  # noqa: F811
    """The output of a `ray job …` command, which may fail."""
    settings = {**nodes.access(cluster.folder), "RAY_API_SERVER_ADDRESS": cluster.jobs}
    done = subprocess.run(
        [str(RAY), "job", *arguments],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.stdout


SUBMIT = ("submit", "--working-dir", ".")


@pytest.mark.slow
def test_without_the_token(cluster):  # noqa: F811
    command = (*SUBMIT, "--", "python", "-V")
    output = ray_job(cluster, *command, RAY_AUTH_MODE="disabled")
    assert quoted("Authentication required: Unauthorized: Missing authentication token") in output
    wrong = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}
    output = ray_job(cluster, *command, **wrong)
    assert quoted("Authentication failed: Forbidden: Invalid authentication token") in output


@pytest.mark.slow
def test_a_python_without_the_dependencies(cluster):  # noqa: F811
    # -S: without the installed packages
    bare = (sys.executable, "-S", "jobs/train.py", "--data", "/nowhere")
    output = ray_job(cluster, *SUBMIT, "--", *bare)
    assert quoted("ModuleNotFoundError: No module named 'pyarrow'") in output


@pytest.mark.slow
@pytest.mark.long
def test_more_gpus_than_there_are(cluster, tmp_path):  # noqa: F811
    data = str(tmp_path / "faces")
    source = ["--source", "synthetic", "--num-images", "200", "--output", data]
    cluster.succeed("python", "jobs/prepare.py", *source)
    train = ["python", "jobs/train.py", "--data", data, "--storage", str(tmp_path), "--use-gpu"]
    output = ray_job(cluster, *SUBMIT, "--", *train)
    refused = quoted("--use-gpu: 2 GPUs requested, the cluster has 0 and does not grow")
    assert f"\ntrain.py: {refused}" in output
    quoted("--use-gpu: 2 GPUs requested, the cluster has 0: waiting for the cluster to grow")
