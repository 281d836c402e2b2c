"""What is used of Ray without being public: without it the jobs still work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import small

from fer_ray.config.schema import TrainConfig
from fer_ray.runtime import ray_compat
from fer_ray.training import run as training

PRIVATE = (
    "ray.train.v2._internal.callbacks.datasets",
    "ray.train.v2._internal.callbacks.placement_group_callback",
    "ray.data._internal.cluster_autoscaler",
    "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
    "ray._private.parameter",
)


@pytest.fixture
def without_private_modules(monkeypatch):
    import ray.train.torch  # noqa: F401 (itself needs them)

    for name in PRIVATE:
        monkeypatch.setitem(sys.modules, name, None)


def test_the_trainer_leaves_out_two_helpers_and_nothing_else(ray_cluster):
    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer

    trainers = [
        kind(lambda: None, run_config=RunConfig(storage_path="/tmp", name="unused"))
        for kind in (TorchTrainer, ray_compat.trainer_class())
    ]
    plain, own = ([type(one).__name__ for one in t._create_default_callbacks()] for t in trainers)
    assert set(plain) - set(own) == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    assert set(own) <= set(plain)


def test_without_the_private_classes_the_trainer_is_rays_own(without_private_modules):
    from ray.train.torch import TorchTrainer

    assert ray_compat.trainer_class() is TorchTrainer


def test_without_the_private_method_the_trainer_is_rays_own(monkeypatch):
    from ray.train.torch import TorchTrainer

    for kind in TorchTrainer.__mro__:
        if "_create_default_callbacks" in vars(kind):
            monkeypatch.delattr(kind, "_create_default_callbacks")
    assert ray_compat.trainer_class() is TorchTrainer


def test_the_agent_of_a_cluster_that_a_job_starts_may_listen_on_any_port():
    from ray._private.parameter import RayParams

    usual = RayParams(num_cpus=1).dashboard_agent_listen_port
    with ray_compat.any_agent_port():
        params = RayParams(num_cpus=1)
    assert (params.dashboard_agent_listen_port, params.num_cpus) == (0, 1)
    assert RayParams(num_cpus=1).dashboard_agent_listen_port == usual != 0


def test_without_the_private_coordinator_and_note_nothing_happens(
    without_private_modules, monkeypatch
):
    ray_compat.start_autoscaling_coordinator()
    with ray_compat.any_agent_port():
        pass
    monkeypatch.setitem(sys.modules, "ray.util.debug", None)
    ray_compat.hide_note_about_progress_bars()


def test_ray_data_does_not_note_that_its_bars_are_off(ray_cluster, capfd):
    from fer_ray.runtime.data_tasks import quiet_ray_data

    quiet_ray_data()
    assert ray_cluster.data.range(3).count() == ray_cluster.data.range(3).materialize().count()
    assert "Progress bars disabled" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_trains_without_the_private_parts(
    ray_cluster, drawn_faces, tmp_path: Path, without_private_modules
):
    values = small.config(schedule={"epochs": 1}).to_dict()
    config = TrainConfig.from_dict({**values, "data": drawn_faces})
    plan = training.plan(config, storage_path=str(tmp_path), run="tried")
    assert training.fit(plan, log=lambda line: None)["epochs"] == 1
