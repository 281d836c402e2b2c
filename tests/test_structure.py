"""The structure that the design asks for: imports point one way, nothing happens at import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fer_ray"
JOBS = sorted((ROOT / "jobs").glob("*.py"))

ORDER = [
    *(
        "errors",
        "labels",
        "storage",
        "config",
        "options",
        "capacity",
        "cli",
        "history",
        "provenance",
    ),
    *("sources", "dataset", "pictures", "synthetic", "ledger", "parts", "settling"),
    *("dataset_summary", "preparation_plan", "preparation"),
    *("transforms", "forward", "exchange", "batchnorm", "models", "optimization", "checkpoint"),
    *("metrics", "group", "loading", "streaming", "loop", "telemetry", "worker"),
    *("shared_images", "interface", "launch", "training"),
    *("predictions", "inference"),
    *("evaluation", "evaluation_tables", "figures", "pages", "preview", "report", "sweeps"),
    *("benchmark_processes", "benchmark_numbers", "benchmark_loops", "benchmark_input"),
    *(
        "benchmark_workers",
        "benchmark_predict",
        "benchmark_sweeps",
        "benchmark_prepare",
        "benchmark",
    ),
    *("augmentation_page", "reference_sweeps", "reference"),
]
"""The flow of the data: a module may import those before it. cli may import any, lazily."""


FOLDERS = {
    "sources": ["files", "folders", "zips", "layouts", "tables", "pixels", "kaggle"],
    "transforms": ["normalization", "randomness", "parameters", "library", "device", "mixing"],
    "sweeps": [
        *("space", "records", "planning", "images", "importance", "halving"),
        *("preflight", "search", "analysis", "winner", "words", "summary", "figures", "report"),
        *("trial", "progress", "tuning"),
    ],
}
"""The flow within the folders."""


def files() -> list[Path]:
    return [*PACKAGE.rglob("*.py"), *JOBS]


def imported(file: Path) -> set[str]:
    """The package's modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fer_ray":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fer_ray."):
            found.add(node.module.split(".")[1])
    return {name for name in found if name in ORDER}


def test_the_order_names_every_module():
    modules = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules | set(FOLDERS) == set(ORDER)
    for folder, names in FOLDERS.items():
        assert {file.stem for file in (PACKAGE / folder).glob("*.py")} - {"__init__"} == set(names)


@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("cli", "reference")])
def test_imports_point_one_way(name):
    later = set(ORDER[ORDER.index(name) :])
    parts = sorted((PACKAGE / name).glob("*.py")) or [PACKAGE / f"{name}.py"]
    found = set.union(*map(imported, parts)) - ({name} if len(parts) > 1 else set())
    assert not found & later
    assert "cli" not in found, "only jobs talk to the command line"


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder, names in FOLDERS.items() for name in names]
)
def test_imports_within_folders_point_one_way(folder, name):
    tree = ast.parse((PACKAGE / folder / f"{name}.py").read_text())
    package, modules = f"fer_ray.{folder}", FOLDERS[folder]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            names.add(node.module.split(".")[2])
    assert names & set(modules) <= set(modules[: modules.index(name)])


def test_importing_the_package_touches_no_disk_and_starts_nothing(tmp_path):
    script = """
import sys, os
import cv2, numpy, pandas, pyarrow.parquet, safetensors.torch, torch  # may do as they like
opened = []
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("os.mkdir", "os.remove", "subprocess.Popen", "socket.connect"):
        opened.append((event, str(arguments[0])))
sys.addaudithook(watch)
import fer_ray
for name in sys.argv[1:]:
    __import__("fer_ray." + name)
    assert not opened, (name, opened)
assert "ray" not in sys.modules, "ray takes seconds: import it where it is used"
"""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(tmp_path)}
    light = ["errors", "labels", "storage", "config", "cli", "history", "dataset", "sources"]
    light += ["metrics", "predictions", "transforms", "forward", "checkpoint", "training"]
    command = [sys.executable, "-c", script, *light]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_short():
    for file in files():
        text = file.read_text()
        assert text.count("\n") <= 400, file.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{file.name}: {node.name} has {length} lines"


def test_jobs_are_thin_and_open_with_their_command():
    for job in JOBS:
        text = job.read_text()
        assert text.count("\n") <= 65, job.name
        first = ast.get_docstring(ast.parse(text)).splitlines()[0]
        assert f"python jobs/{job.name} " in first


def test_no_machine_path_and_no_index_host_in_what_is_committed():
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    )
    hosts = ("pythonhosted" + ".org", "pypi" + ".org")
    for name in listed.stdout.splitlines():
        content = (ROOT / name).read_bytes()
        assert not any(host.encode() in content for host in hosts), name
        assert not name.lower().endswith((".jpg", ".jpeg", ".zip", ".pt", ".pth")), name
