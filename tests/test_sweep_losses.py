"""What follows from lost processes and GPUs: which trials train again, and where."""

from __future__ import annotations

from ray.exceptions import RayActorError

from fer_ray.sweeps.losses import GpuFailed, Losses, WorkersLost

NO_DRIVER = "the GPU of node 10.0.0.2 failed: Found no NVIDIA driver on your system."
FAULT = "the GPU of node 10.0.0.2 failed: CUDA error: an illegal memory access was encountered"
NODES = {"a", "b"}


def losses(max_failures: int = 1) -> Losses:
    """Those of a cluster of two nodes, each of which a trial fits."""
    return Losses(max_failures, lambda avoided: bool(NODES - avoided))


def test_a_trial_recovers_from_as_many_lost_processes_as_the_settings_allow():
    counted = losses(max_failures=2)
    errors = [RayActorError(error_msg="it died"), WorkersLost("its workers failed"), None]
    assert [counted.record(7, error) for error in errors] == [True, True, False]
    assert counted.record(8, None), "each trial has its own count"
    assert not counted.avoided_by(7) and not counted.leave_no_node


def test_a_node_without_a_driver_is_avoided_after_two_failures_and_no_trial_fails():
    counted = losses(max_failures=0)
    assert counted.record(0, GpuFailed(NO_DRIVER, "a"))
    assert counted.avoided_by(0) == {"a"} and counted.avoided_by(1) == set()
    assert counted.record(1, GpuFailed(NO_DRIVER, "a"))
    assert counted.avoided_by(2) == {"a"} and not counted.leave_no_node
    assert counted.reasons() == [NO_DRIVER]
    assert counted.record(0, GpuFailed(NO_DRIVER, "b"))
    assert counted.avoided_by(0) == {"a"}, "no node would be left"
    assert counted.record(0, GpuFailed(NO_DRIVER, "b"))
    assert counted.leave_no_node and len(counted.reasons()) == 2


def test_a_trial_whose_kernels_fail_everywhere_fails_and_takes_no_node_with_it():
    counted = losses(max_failures=2)
    faults = [GpuFailed(FAULT, node) for node in ("a", "b", "a")]
    assert [counted.record(3, fault) for fault in faults] == [True, True, False]
    assert counted.avoided_by(4) == set()
    assert counted.record(4, GpuFailed(FAULT, "a"))
    assert counted.avoided_by(5) == {"a"}, "two trials failed there"
