"""The structure that the design asks for: imports point one way, nothing happens at import."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fer_ray"
JOBS = sorted((ROOT / "jobs").glob("*.py"))

LEVELS = [
    ["errors"],
    ["storage", "registry"],
    ["metrics"],
    ["config"],
    ["data"],
    ["runtime"],
    ["transforms"],
    ["models"],
    ["reporting"],
    ["preparation", "training", "inference", "evaluation"],
    ["sweeps"],
    ["benchmarks"],
    ["cli"],
]
"""Folders and single modules, the shared ones first. Each may import those of levels before it;
those of one level do not know each other. A job's folder is found from the job's name."""

ALLOWED = {
    ("benchmarks.reference", "cli"),  # has a command line of its own
}
"""Imports against the levels, each with its reason."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's own."""
    named = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            named[name] = file
    return named


MODULES = modules()
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def imported(file: Path) -> set[str]:
    """The package's modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fer_ray":
            base = node.module.removeprefix("fer_ray").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                names.add(full if full in MODULES else base)
    return names - {""}


def test_every_folder_has_its_level_and_few_modules_lie_at_the_top():
    top = {name for name in MODULES if "." not in name}
    assert top == set(LEVEL_OF)
    assert len([name for name in top if MODULES[name].name != "__init__.py"]) <= 9


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    own = name.split(".")[0]
    for other in imported(MODULES[name]):
        folder = other.split(".")[0]
        if folder != own and (name, folder) not in ALLOWED:
            assert LEVEL_OF[folder] < LEVEL_OF[own], f"{name} imports {other}"


def test_sweeps_use_training_and_no_other_job():
    others = {"preparation", "inference", "evaluation"}
    for name in MODULES:
        if name.startswith("sweeps"):
            assert not {other.split(".")[0] for other in imported(MODULES[name])} & others, name


def test_imports_within_folders_have_no_circle():
    """A package counts as its `__init__`: what imports the package imports that."""
    graph = {name: imported(file) - {name} for name, file in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


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
    light = ["errors", "storage", "metrics", "config.schema", "config.overrides", "cli"]
    light += ["data.labels", "data.history", "data.dataset", "data.predictions", "data.sources"]
    light += ["transforms", "models.forward", "models.checkpoint", "training.run"]
    command = [sys.executable, "-c", script, *light]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def literals(file: Path) -> set[str]:
    """The strings that a file's code holds; docstrings are left out."""
    tree = ast.parse(file.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {node.value for node in strings if isinstance(node.value, str) and id(node) not in docs}


OWNED = {
    "config.json": "data.run_folder",
    "history.parquet": "data.run_folder",
    "run.json": "data.run_folder",
    "failure.json": "data.run_folder",
    "row_groups.json": "data.run_folder",
    "placement_group.json": "data.run_folder",
    "checkpoint.json": "data.run_folder",
    "_manifest.json": "data.predictions",
    "part-\\d": "data.predictions",
}
"""Names of files of a run or of predictions, and the only module that spells each."""


@pytest.mark.parametrize("name", OWNED)
def test_each_file_of_a_run_and_of_predictions_is_named_in_one_module(name):
    spelled = {
        module for module, file in MODULES.items() if any(name in text for text in literals(file))
    }
    assert spelled == {OWNED[name]}


def test_only_public_parts_of_ray_are_used_outside_of_ray_compat():
    for name, file in MODULES.items():
        if name == "runtime.ray_compat":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
                words = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not any(word.startswith("_") for word in words), f"{name}: {words}"
            if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr):
                root = ast.unparse(node.value).split(".")[0]
                assert root != "ray", f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.keyword) and node.arg:
                assert not node.arg.startswith("_"), f"{name}: {node.arg}"
        assert not any(re.match(r"ray\..*\._", text) for text in literals(file)), name


def test_files_and_functions_stay_short():
    for file in (*MODULES.values(), *JOBS):
        text = file.read_text()
        assert text.count("\n") <= 400, file.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 50, f"{file.name}: {node.name} has {length} lines"


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
