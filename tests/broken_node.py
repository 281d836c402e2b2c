"""A plug-in for processes of Ray: the GPU driver of one node is broken.

It is the node of the process that trains first. The environment variable `BROKEN_NODE` names a
file in which that process writes the node's id.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from fer_ray.training import loop

train = loop.train


def fail_or_train(*arguments: Any, **options: Any) -> None:
    import ray

    node, file = ray.get_runtime_context().get_node_id(), Path(os.environ["BROKEN_NODE"])
    with contextlib.suppress(FileExistsError), file.open("x") as new:
        new.write(node)
    if file.read_text() == node:
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have one")
    train(*arguments, **options)


loop.train = fail_or_train
