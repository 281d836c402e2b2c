"""Fixtures that several test modules share: one Ray cluster, an S3 server, the real images."""

from __future__ import annotations

import logging
import os
import sys
import zipfile
from pathlib import Path

import pytest
from faces import HOSTILE
from nodes import free_ports

ROOT = Path(__file__).resolve().parents[1]
REAL_IMAGES = ROOT.parent / "shared" / "fer2013" / "facial-emotion-expressions.zip"

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Ray processes would compile everything anew
os.environ.pop("RAY_ADDRESS", None)
# the tests' networks are so small that a second thread only makes the first wait for it
os.environ.setdefault("OMP_NUM_THREADS", "1")
# before Ray starts, so that its workers know it too
(STORE_PORT,) = free_ports(1)
os.environ["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{STORE_PORT}"
os.environ |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster of this machine alone, two CPUs, started once for all tests."""
    from fer_ray import cli

    cli.start_ray(num_cpus=2)
    cli._started.clear()  # jobs that run in this process leave it to the others
    import ray

    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def store():
    """An S3 server on this machine, which ``s3://`` leads to in all processes of the tests."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", STORE_PORT, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def drawn_faces(ray_cluster, tmp_path_factory) -> str:
    """The place of a prepared data set of 400 synthetic faces, 320 of them in train."""
    from fer_ray.preparation.plan import plan_preparation
    from fer_ray.preparation.run import prepare

    path = str(tmp_path_factory.mktemp("data") / "faces")
    plan = plan_preparation(source="synthetic", output=path, num_images=400)
    prepare(plan, log=lambda line: None)
    return path


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The FER-2013 zip; the test is skipped where it is absent."""
    if not REAL_IMAGES.exists():
        pytest.skip(f"the FER-2013 images are not at {REAL_IMAGES.relative_to(ROOT.parent)}")
    return REAL_IMAGES


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """A generated sweep of normalizations with known effects."""
    import sweep_samples

    return sweep_samples.normalization(tmp_path_factory.mktemp("sweeps") / "normalization")


@pytest.fixture(scope="module")
def search(tmp_path_factory) -> Path:
    """A generated search in which the learning rate decides."""
    import sweep_samples

    return sweep_samples.search(tmp_path_factory.mktemp("sweeps") / "search")


@pytest.fixture
def hostile(tmp_path) -> Path:
    for path, content in HOSTILE.items():
        target = tmp_path / "faces" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return tmp_path / "faces"


@pytest.fixture
def hostile_zip(tmp_path) -> Path:
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path, content in HOSTILE.items():
            archive.writestr(path, content)
    return tmp_path / "faces.zip"
