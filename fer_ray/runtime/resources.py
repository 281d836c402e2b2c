"""The resources a job requests, compared with those the cluster has or may grow to.

Ray waits without end for resources that no node can provide. `check`, called before the work,
refuses what the cluster can never provide and reports what the job waits for.

Ray 2.60 has no public call that tells how far a cluster may grow. A cluster that the job started
itself does not grow. For others the environment variable `MAXIMUM` may state the maximum; without
it a request that is too large waits, with a message that says how to end the wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fer_ray.errors import UserError

MAXIMUM = "FER_RAY_MAX_RESOURCES"
"""Environment variable: ``fixed`` for a cluster that does not grow, or the totals to which its
autoscaler may grow, such as ``CPU=64,GPU=8``."""
FIXED = "fixed"

_RELEASE_S = 1.0
"""Seconds that Ray may take to report resources as free after a job has released them."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Processes that have to run at the same time."""

    each: Mapping[str, float]
    """Resources that each process reserves, above 0; one node has to have all of them."""
    count: int = 1
    """Number of processes."""
    flags: Mapping[str, str]
    """By resource, the flag to change where there is too little of it."""
    hint: str = ""
    """What to request instead."""


def check(
    demand: Demand, *, log: Callable[[str], None] = print, may_wait: bool = True
) -> list[Mapping[str, float]]:
    """Refuses what the connected cluster can never provide, and reports what the job waits for.

    Args:
        demand: what the job will request from Ray.
        log: receives a line where the job has to wait.
        may_wait: whether to wait for a cluster to grow.

    Returns:
        The resources of each living node.

    Raises:
        UserError: where the nodes are too few or too small and no others will be added, or where
            `MAXIMUM` is not readable.
    """
    nodes = _living_nodes()
    if fitting(demand.each, nodes) >= demand.count:
        if may_wait:
            _report_shortage(demand, log)
        return nodes
    shortage = _shortage(demand, nodes)
    hint = f"; {demand.hint}" if demand.hint else ""
    maximum = _maximum() if may_wait else {}
    if maximum is None:
        log(
            f"{shortage}: waiting for the cluster to grow; if it cannot (set {MAXIMUM} to have "
            "such requests refused), stop the job and request less"
        )
    elif (most := _fitting_totals(demand.each, nodes, maximum)) >= demand.count:
        log(f"{shortage}: waiting for the cluster to grow")
    elif maximum:
        raise UserError(
            f"{shortage}, and at its maximum ({MAXIMUM}={os.environ[MAXIMUM]}) "
            f"{most} of {demand.count} would fit{hint}"
        )
    else:
        reason = " and does not grow" if os.environ.get("RAY_ADDRESS") and may_wait else ""
        raise UserError(f"{shortage}{reason}{hint}")
    return nodes


def fitting(each: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """The number of processes that fit some nodes, each process on a single node.

    Args:
        each: what a process reserves; at least one resource.
        nodes: the resources of each node.
    """
    return sum(
        min(_times(name, amount, node.get(name, 0.0)) for name, amount in each.items())
        for node in nodes
    )


def fits_beside(each: Mapping[str, float], avoided: Collection[str], *, count: int) -> bool:
    """Whether processes fit the living nodes of the connected cluster without some of them.

    Args:
        each: what a process reserves; at least one resource.
        avoided: ids of the nodes to leave out.
        count: number of processes.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in avoided]
    return fitting(each, [node["Resources"] for node in nodes]) >= count


def label_selector(avoided: Collection[str]) -> dict[str, str]:
    """Ray's label selector for all nodes but some; empty for all nodes.

    Args:
        avoided: ids of the nodes to leave out.
    """
    return {"ray.io/node-id": f"!in({','.join(sorted(avoided))})"} if avoided else {}


def _times(name: str, amount: float, available: float) -> int:
    """How often an amount of a resource fits a node; 1e-9: three times 0.1 fits into 0.3."""
    if name == "GPU" and amount < 1:  # a fraction is always of a single GPU
        whole, fraction = divmod(available + 1e-9, 1)
        return int(whole) * int(1 / amount + 1e-9) + int(fraction / amount)
    return int(available / amount + 1e-9)


def fitting_at_maximum(each: Mapping[str, float]) -> int | None:
    """The number of processes that fit the connected cluster once it has grown to its maximum.

    Args:
        each: what a process reserves; at least one resource.

    Returns:
        None where the maximum is not known.
    """
    maximum = _maximum()
    return None if maximum is None else _fitting_totals(each, _living_nodes(), maximum)


def _fitting_totals(
    each: Mapping[str, float], nodes: Sequence[Mapping[str, float]], maximum: Mapping[str, float]
) -> int:
    """At most so many processes fit; how the totals are spread over nodes is not known."""
    grown = fitting(each, [maximum]) if maximum else 0
    return max(grown, fitting(each, nodes))


def _living_nodes() -> list[Mapping[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _maximum() -> dict[str, float] | None:
    """The totals to which the cluster may grow; empty where it does not; None where unknown."""
    text = os.environ.get(MAXIMUM, "").strip()
    if not os.environ.get("RAY_ADDRESS") or text == FIXED:  # without an address the job started it
        return {}
    if not text:
        return None
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(amount) for name, amount in pairs}
    except ValueError as error:
        raise UserError(
            f"{MAXIMUM}: {text!r} is neither {FIXED!r} nor totals such as 'CPU=64,GPU=8'"
        ) from error


def _shortage(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> str:
    """What is missing, of the scarcest resource."""
    totals = {name: sum(node.get(name, 0.0) for node in nodes) for name in demand.each}
    name, requested = _scarcest(demand, totals)
    text = f"{demand.flags[name]}: {requested:g} {name}s requested, the cluster has "
    text += f"{totals[name]:g}"
    if requested > totals[name] + 1e-9:
        return text
    shape = " and ".join(f"{amount:g} {resource}s" for resource, amount in demand.each.items())
    fit = fitting(demand.each, nodes)
    return f"{text}, but each process needs {shape} on one node: {fit} of {demand.count} fit"


def _scarcest(demand: Demand, totals: Mapping[str, float]) -> tuple[str, float]:
    """The resource of which the smallest fraction is there, and how much is requested of it."""
    requested = {name: amount * demand.count for name, amount in demand.each.items()}
    name = min(requested, key=lambda resource: totals.get(resource, 0.0) / requested[resource])
    return name, requested[name]


def _report_shortage(demand: Demand, log: Callable[[str], None]) -> None:
    """Reports that other jobs hold the resources; by totals, which are all that Ray tells."""
    import ray

    for pause in (_RELEASE_S, 0.0):
        free = ray.available_resources()
        name, requested = _scarcest(demand, free)
        if requested <= free.get(name, 0.0) + 1e-9:
            return
        time.sleep(pause)
    total = ray.cluster_resources().get(name, 0.0)
    log(
        f"{demand.flags[name]}: {requested:g} {name}s requested, {free.get(name, 0.0):g} of "
        f"{total:g} are free: waiting for other jobs to end"
    )
