"""What a figure was measured on and with: hardware, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("fer_ray", "ray", "torch", "torchvision", "albumentations", "numpy", "pyarrow")


def describe(device: torch.device) -> dict[str, Any]:
    """The hardware and versions of this process, as JSON types."""
    return {"hardware": _hardware(device), "versions": _versions()}


def git_commit() -> str | None:
    """The commit of the code that runs, ``-dirty`` appended where files differ from it."""
    root = str(Path(__file__).resolve().parents[2])
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads_per_worker": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return hardware


def _processor() -> str:
    """The processor's name and what of it matters to matrix products."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
