"""The workers that train together, seen from one of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """This worker's position among all workers; by default it is the only one."""

    rank: int = 0
    """This worker's number, from 0."""
    size: int = 1
    """Number of workers; above 1, `torch.distributed` is initialized."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this worker computes."""

    def shard(self, count: int) -> slice:
        """This worker's contiguous shard of `count` items; sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce(self, values: np.ndarray) -> np.ndarray:
        """Sums float64 or int64 values over all workers; every worker gets the same result."""
        if self.size == 1:
            return values
        tensor = torch.from_numpy(np.array(values)).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def maximum(self, value: float) -> float:
        """The largest of the workers' values, which have to be 0 or more, such as seconds."""
        values = np.zeros(self.size)
        values[self.rank] = value
        return float(self.all_reduce(values).max())

    def broadcast(self, text: str) -> str:
        """Returns the text of worker 0 on every worker; also a barrier."""
        own = np.frombuffer(text.encode() if self.rank == 0 else b"", dtype=np.uint8)
        characters = np.zeros(int(self.all_reduce(np.array([own.size]))[0]), dtype=np.int64)
        if not characters.size:
            return ""
        characters[: own.size] = own
        return self.all_reduce(characters).astype(np.uint8).tobytes().decode()
