"""What a job asks of a cluster, against what the cluster has or may grow to.

Ray waits without end for what no node can give. `check`, before the work, refuses what can never
come and says what a job waits for. Ray 2.60 has no call that tells how far a cluster grows; the
autoscaler's own settings do, on the head, where ``ray up`` runs it. KubeRay runs it in a
container of its own, unseen from here: there a job waits.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fer_ray.errors import UserError

_HEAD = "node:__internal_head__"
"""A resource that the head alone has."""
_LOOK_S = 60.0
"""How long to wait for the head to look at itself."""
_FOLLOW_S = 1.0
"""How often to look how far a cluster has grown."""
_LAST_LOOK_S = 5.0
"""How long the last look may take: a lost head does not answer."""
_START_S = 1.0
"""How long a process that was just started may have no command line yet."""
_RELEASE_S = 1.0
"""How long what a job used a moment ago may take to be free again."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Processes that have to run at once."""

    each: Mapping[str, float]
    """Resources that each reserves, above 0; a node has to have all of them."""
    count: int = 1
    """How many processes."""
    flags: Mapping[str, str]
    """What to change where a resource is short, for each of them."""
    hint: str = ""
    """What may fit instead."""


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """Nodes that an autoscaler may start."""

    resources: Mapping[str, float]
    """What each has."""
    most: int
    """How many of this type there may be."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How far a cluster grows by itself: by default not at all."""

    known: bool = True
    """Whether it is known here."""
    types: tuple[NodeType, ...] = ()
    most: int = 0
    """How many nodes there may be beside the head; 0 where that is not known either."""

    def of(self, num_nodes: int) -> Growth:
        """What is known of it, seen that so many nodes live."""
        complete = not self.known and 0 < self.most < num_nodes
        return Growth() if complete else self

    def fitting(self, each: Mapping[str, float]) -> int:
        """How many processes fit all nodes that may be started."""
        sizes = [(fitting(each, [one.resources]), one.most) for one in self.types]
        room, left = 0, self.most
        for size, most in sorted(sizes, reverse=True):
            started = min(most, left)
            room, left = room + size * started, left - started
        return room


def check(
    demand: Demand, *, log: Callable[[str], None] = print, may_wait: bool = True
) -> list[Mapping[str, float]]:
    """Refuses what the connected cluster can never give, and says what is waited for.

    Args:
        demand: what the job will ask Ray for.
        log: receives a line where the job has to wait.
        may_wait: whether a cluster may grow for it.

    Returns:
        The resources of each living node.

    Raises:
        UserError: where the nodes are too few or too small, and no others will come.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    has = [node["Resources"] for node in nodes]
    if fitting(demand.each, has) >= demand.count:
        if may_wait:
            _say_what_is_taken(demand, log)
        return has
    lack = _lack(demand, has)
    growth = _growth(nodes) if may_wait else Growth()
    doubt = "" if growth.known else " (whether it may grow so far is not known here)"
    if growth.known:
        most = _fitting_grown(demand.each, has, growth)
        if most < demand.count:
            reason = _reason(demand, growth, most) if may_wait else ""
            raise UserError(f"{lack}{reason}{f'; {demand.hint}' if demand.hint else ''}")
    log(f"{lack}: waiting for it to grow{doubt}")
    done = threading.Event()
    room = min(fitting(demand.each, has), demand.count)
    follower = threading.Thread(target=_follow, args=(demand, room, done, log), daemon=True)
    follower.start()
    _following.append((done, follower))
    return has


_following: list[tuple[threading.Event, threading.Thread]] = []


def stop_following() -> None:
    """Ends what `check` left behind to say how the cluster grows, after a last look."""
    while _following:
        done, follower = _following.pop()
        done.set()
        follower.join(_LAST_LOOK_S)


def _follow(demand: Demand, before: int, done: threading.Event, log: Callable[[str], None]) -> None:
    """Says how the cluster grows, until the demand fits or the work is done."""
    import ray

    with contextlib.suppress(Exception):  # of a cluster that is left meanwhile
        last = False
        while before < demand.count and not last:
            last = done.wait(_FOLLOW_S)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            room = min(fitting(demand.each, nodes), demand.count)
            if room != before:
                log(f"the cluster has changed: {room} of {demand.count} fit now")
            before = room


def fitting(each: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """How many processes fit some nodes, each of them whole on one.

    Args:
        each: what a process reserves; at least one resource.
        nodes: what each node has.
    """
    return sum(
        min(_times(kind, amount, node.get(kind, 0.0)) for kind, amount in each.items())
        for node in nodes
    )


def _times(kind: str, amount: float, has: float) -> int:
    """How often a node has so much of a resource; 1e-9: three times 0.1 fits into 0.3."""
    if kind == "GPU" and amount < 1:  # a part is of one of them
        whole, part = divmod(has + 1e-9, 1)
        return int(whole) * int(1 / amount + 1e-9) + int(part / amount)
    return int(has / amount + 1e-9)


def fitting_when_grown(each: Mapping[str, float]) -> int | None:
    """How many processes fit the connected cluster, grown as far as it may.

    Args:
        each: what a process reserves; at least one resource.

    Returns:
        None where it is not known here how far the cluster grows.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    has, growth = [node["Resources"] for node in nodes], _growth(nodes)
    if not growth.known:
        return None
    return max(_fitting_grown(each, has, growth), fitting(each, has))


def _fitting_grown(
    each: Mapping[str, float], nodes: Sequence[Mapping[str, float]], growth: Growth
) -> int:
    # other nodes than the head are among those that an autoscaler may start
    head = [one for one in nodes if not growth.types or _HEAD in one]
    return fitting(each, head) + growth.fitting(each)


def _lack(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> str:
    """What is missing, of the resource that is shortest."""
    has = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in demand.each}
    wanted = {kind: amount * demand.count for kind, amount in demand.each.items()}
    kind = min(wanted, key=lambda one: has[one] / wanted[one])
    text = f"{demand.flags[kind]}: {wanted[kind]:g} {kind}s wanted, the cluster has {has[kind]:g}"
    if wanted[kind] > has[kind] + 1e-9:
        return text
    shape = " and ".join(f"{amount:g} {one}s" for one, amount in demand.each.items())
    room = fitting(demand.each, nodes)
    return f"{text}, but with {shape} together on one node for each, {room} of {demand.count} fit"


def _reason(demand: Demand, growth: Growth, most: int) -> str:
    """Why waiting would not help."""
    if growth.types:
        return f", and grown as far as it may, {most} of {demand.count} would fit"
    return " and does not grow by itself" if os.environ.get("RAY_ADDRESS") else ""


def _say_what_is_taken(demand: Demand, log: Callable[[str], None]) -> None:
    from ray._private.state import available_resources_per_node  # there is no public one

    free: list[Mapping[str, float]] = []
    for pause in (_RELEASE_S, 0.0):
        free = list(available_resources_per_node().values())
        if fitting(demand.each, free) >= demand.count:
            return
        time.sleep(pause)
    log(f"{_shortest(demand, free)}: waiting for other jobs")


def _shortest(demand: Demand, free: Sequence[Mapping[str, float]]) -> str:
    """What is not free, of the resource that is shortest."""
    import ray

    left = {kind: sum(node.get(kind, 0.0) for node in free) for kind in demand.each}
    kind = min(left, key=lambda one: left[one] / (demand.each[one] * demand.count))
    wanted, has = demand.each[kind] * demand.count, ray.cluster_resources()[kind]
    text = f"{demand.flags[kind]}: {wanted:g} {kind}s wanted, {left[kind]:g} of {has:g} are free"
    if wanted > left[kind] + 1e-9:
        return text
    return f"{text}, but {fitting(demand.each, free)} of {demand.count} fit on single nodes"


def _growth(nodes: Sequence[Mapping[str, Any]]) -> Growth:
    """Asks the head of the connected cluster how far it grows."""
    import ray

    if not os.environ.get("RAY_ADDRESS"):
        return Growth()  # this job started it
    context = ray.get_runtime_context()
    session, own = context.get_session_name(), context.get_node_id()
    if any(node["NodeID"] == own and _HEAD in node["Resources"] for node in nodes):
        return growth_of(session).of(len(nodes))
    look = ray.remote(num_cpus=0, resources={_HEAD: 0.001})(growth_of)
    try:
        found: Growth = ray.get(look.remote(session), timeout=_LOOK_S)
    except (ray.exceptions.RayError, TimeoutError):
        return Growth(known=False)
    return found.of(len(nodes))


def growth_of(session: str) -> Growth:
    """How far a cluster grows, as seen on its head.

    Every head has a process that watches the cluster: with settings it is an autoscaler, without
    it only reports. Where there is none, whoever runs the cluster scales it from outside.

    Args:
        session: the cluster's, as `get_session_name` of Ray's runtime context has it.
    """
    for pause in (_START_S, 0.0):
        if found := _growth_by(session):
            return found
        time.sleep(pause)
    return Growth(known=False)


def _growth_by(session: str) -> Growth | None:
    """What the process that watches a cluster was told; None where there is none."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        given = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        is_monitor = any(word.endswith("monitor.py") for word in words)
        if is_monitor and session in given.get("--logs-dir", "").split("/"):
            path = given.get("--autoscaling-config")
            return _settings(Path(path).expanduser()) if path else Growth()
    return None


def _settings(path: Path) -> Growth:
    """The limits that an autoscaler's settings set, as `ray up` leaves them on the head."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text())
        most = int(settings["max_workers"])
        types = tuple(
            NodeType(
                resources=one.get("resources") or {},
                most=int(one.get("max_workers", 0 if name == settings["head_node_type"] else most)),
            )
            for name, one in settings["available_node_types"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return Growth(known=False)
    types = tuple(one for one in types if one.most)
    if not all(one.resources for one in types):  # machines of one's own: all of them may be there
        return Growth(known=False, most=most)
    return Growth(types=types, most=most)
