"""What is lost while a sweep runs, processes, workers and GPUs, and what follows from it.

A trial whose process died, whose workers were lost or whose GPU failed is trained again from its
last checkpoint. A node with a broken driver fails its trials within seconds and is then the first
that is free for the next ones: it is avoided after two failures.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from fer_ray.runtime.process import is_kernel_fault

FAILURES_OF_A_NODE = 2
"""After so many failures of its GPUs, a node is avoided for the rest of the session."""


class WorkersLost(RuntimeError):
    """The workers of a trial ended without a reason of their own, as killed processes do."""


class GpuFailed(WorkersLost):
    """A GPU or its driver failed, and with it the process of a trial or one of its workers."""

    def __init__(self, reason: str, node: str) -> None:
        """Takes the reason, from `process.gpu_failure_here`, and Ray's id of the node."""
        super().__init__(reason, node)
        self.reason, self.node = reason, node

    def __str__(self) -> str:
        return self.reason


class Losses:
    """Counts the losses of one session; a new session starts without any."""

    def __init__(self, max_failures: int, fits: Callable[[frozenset[str]], bool]) -> None:
        """Starts without losses.

        Args:
            max_failures: how many losses each trial recovers from.
            fits: returns whether a trial fits the cluster without some nodes, by their ids.
        """
        self._max_failures, self._fits = max_failures, fits
        self._num_losses: Counter[int] = Counter()  # by trial
        self._failures: dict[str, list[GpuFailed]] = defaultdict(list)  # by node
        self._trials: dict[str, set[int]] = defaultdict(set)  # those that failed, by node
        self._avoided: dict[str, GpuFailed] = {}

    @property
    def leave_no_node(self) -> bool:
        """Whether the avoided nodes leave none that a trial fits: no further one can train."""
        return bool(self._avoided) and not self._fits(frozenset(self._avoided))

    def avoided_by(self, number: int) -> frozenset[str]:
        """Ids of the nodes that a trial has to avoid.

        Where others are left, it also avoids those on which its own GPU has failed.
        """
        avoided = frozenset(self._avoided)
        own = {node for node, numbers in self._trials.items() if number in numbers}
        return avoided | own if own - avoided and self._fits(avoided | own) else avoided

    def reasons(self) -> list[str]:
        """For each avoided node, how its GPU failed last."""
        return [failure.reason for failure in self._avoided.values()]

    def record(self, number: int, error: BaseException | None) -> bool:
        """Records a loss; returns whether the trial is to be trained again.

        A GPU that cannot be used at all is no fault of the trial, which is then trained again
        however often that happens. Faults of kernels may be faults of the computation: they count
        for the trial as well, and for the node only once a trial.

        Args:
            number: of the trial.
            error: what ended it; None where that is not known.
        """
        if isinstance(error, GpuFailed):
            self._failures[error.node].append(error)
            self._trials[error.node].add(number)
            is_fault = is_kernel_fault(error.reason)
            failures = self._trials[error.node] if is_fault else self._failures[error.node]
            if len(failures) >= FAILURES_OF_A_NODE:
                self._avoided[error.node] = error
            if not is_fault:
                return True
        self._num_losses[number] += 1
        return self._num_losses[number] <= self._max_failures
