"""Who may use the cluster that a job starts for itself: nobody else, on a shared machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
CLUSTER = """
import os, sys
from fer_ray import cli
from fer_ray.runtime import token
cli.start_ray(num_cpus=1)
import ray
address, socket = ray.get_runtime_context().gcs_address, ray.nodes()[0]["RayletSocketName"]
print("cluster", address, token._token(), socket, flush=True)
assert ray.get(ray.remote(lambda: 7).remote()) == 7
assert "RAY_AUTH_TOKEN" not in os.environ
sys.stdin.read()
"""
STRANGER = """
import sys, ray
ray.init(address=sys.argv[1])
print("entered")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A job's own cluster: its address, its token, the folder of its session, and its home."""
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment(home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = next(line for line in process.stdout if line.startswith("cluster "))
    _, address, token, socket = line.split()
    yield address, token, Path(socket).parents[1], home
    process.communicate()
    assert process.returncode == 0


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), **more}


@pytest.mark.slow
def test_the_token_is_in_no_file_and_no_other_user_reads_it(cluster):
    _, token, session, home = cluster
    assert session.is_dir() and not list(home.rglob("auth_token"))
    find = ["grep", "-rlsF", token, str(home), str(session), "/proc/self/environ"]
    assert subprocess.run(find, stdout=subprocess.DEVNULL, check=False).returncode in (1, 2)
    if os.getuid() == 0:
        processes = [str(path) for path in Path("/proc").glob("[0-9]*")]
        files = [f"{path}/{name}" for path in processes for name in ("environ", "cmdline")]
        done = subprocess.run(
            ["grep", "-lsF", token, *files], user=NOBODY, capture_output=True, check=False
        )
        assert done.stdout == b""
        own = subprocess.run(["grep", "-lsF", token, *files], capture_output=True, check=False)
        assert own.stdout, "the user who started it can"


@pytest.mark.slow
@pytest.mark.parametrize("token", ["", "0" * 64])
def test_who_does_not_have_the_token_is_refused(cluster, tmp_path, token):
    more = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"} if token else {}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, cluster[0]],
        env=environment(tmp_path, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0 and "entered" not in done.stdout
    assert "auth" in done.stderr.lower() or "token" in done.stderr.lower()
