"""A plug-in for processes of Ray: the GPU driver of one node is broken.

The environment variable `BROKEN_NODE` names a file with the id of that node.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fer_ray.sweeps import trial

train_here = trial._train_here


def fail_or_train(*arguments: Any) -> None:
    import ray

    if ray.get_runtime_context().get_node_id() == Path(os.environ["BROKEN_NODE"]).read_text():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have one")
    train_here(*arguments)


trial._train_here = fail_or_train
