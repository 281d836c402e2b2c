"""The workers that train together, seen from one of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """Where this worker stands among the others; alone by default."""

    rank: int = 0
    """This worker, from 0."""
    size: int = 1
    """How many there are; above 1, `torch.distributed` is initialized."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this worker computes."""

    def part(self, count: int) -> slice:
        """This worker's contiguous part of `count` things; sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Adds up float64 or int64 values over all workers; the same result on each."""
        if self.size == 1:
            return values
        tensor = torch.from_numpy(np.array(values)).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def slowest(self, seconds: float) -> float:
        """The largest of all workers' times."""
        everyone = np.zeros(self.size)
        everyone[self.rank] = seconds
        return float(self.total(everyone).max())

    def agree(self, text: str) -> str:
        """The first worker's text, on each of them."""
        own = np.frombuffer(text.encode() if self.rank == 0 else b"", dtype=np.uint8)
        told = np.zeros(int(self.total(np.array([own.size]))[0]), dtype=np.int64)
        if not told.size:
            return ""
        told[: own.size] = own
        return self.total(told).astype(np.uint8).tobytes().decode()
