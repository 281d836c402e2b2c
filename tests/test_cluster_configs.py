"""The files for `ray up`: read by Ray's own functions, locked, and installed from the lock."""

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

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
NAMES = ("aws", "gcp", "on_premise")
CLOUDS = ("aws", "gcp")
LOCK = ROOT / "requirements.lock"


def read(name: str) -> dict[str, Any]:
    return strict.load(CLUSTER / f"{name}.yaml")


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with Ray's defaults, as `ray up` validates it.

    Raises:
        jsonschema.ValidationError, ValueError: where Ray refuses it.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = prepare_config(copy.deepcopy(config))
    validate_config(made)
    return made


def start_options(commands: list[str]) -> dict[str, Any]:
    """What Ray's own command line makes of the one `ray start` among the commands.

    Raises:
        click.UsageError: for a flag that `ray start` does not know.
    """
    from ray.scripts.scripts import start

    (command,) = (one for one in commands if "ray start" in one)
    environment, _, arguments = command.partition("ray start ")
    assert "export RAY_AUTH_MODE=token " in environment, "the token is not asked for"
    options = start.make_context("start", shlex.split(arguments)).params
    return {name: value for name, value in options.items() if value is not None}


def check_locked(config: dict[str, Any]) -> None:
    """Only the head serves the dashboard, on its loopback; the token reaches every node."""
    head = start_options(config["head_start_ray_commands"])
    assert head["head"] and head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    worker = start_options(config["worker_start_ray_commands"])
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", NAMES)
def test_ray_takes_the_file(name):
    config = prepared(read(name))
    assert config["cluster_name"] == "fer-ray"
    check_locked(config)


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
    "image without a name": (lambda config: config["docker"].pop("head_image"), AssertionError),
}


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("case", WRONG)
def test_ray_would_notice(case, name):
    config = read(name)
    change, error = WRONG[case]
    change(config)
    with pytest.raises(error):
        prepared(config)


@pytest.mark.parametrize("name", CLOUDS)
def test_an_open_dashboard_would_be_noticed(name):
    config = read(name)
    del config["head_start_ray_commands"]
    with pytest.raises(AssertionError, match="the token is not asked for"):
        check_locked(prepared(config))
    config = read(name)
    commands = config["head_start_ray_commands"]
    commands[-1] = commands[-1].replace("127.0.0.1", "0.0.0.0")
    with pytest.raises(AssertionError):
        check_locked(prepared(config))


def test_a_key_that_stands_twice_would_be_noticed():
    with pytest.raises(yaml.YAMLError, match="max_workers given twice"):
        strict.load_all("max_workers: 1\nprovider: {type: aws}\nmax_workers: 2\n")


def test_an_unknown_flag_of_ray_start_would_be_noticed():
    import click

    with pytest.raises(click.UsageError):
        start_options(["export RAY_AUTH_MODE=token A=b; ray start --head --dashboard-hosts=x"])


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_shell(name):
    config = prepared(read(name))
    for field, commands in config.items():
        for command in commands if field.endswith("_commands") else ():
            done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{field}: {command}\n{done.stderr}"


@pytest.mark.parametrize("name", NAMES)
def test_the_dependencies_are_those_of_the_lock_with_hashes(name):
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


def test_googles_client_is_locked_to_versions_that_the_lock_has():
    def pins(file: Path) -> dict[str, str]:
        entries = re.split(r"\n(?=[a-z])", file.read_text())
        assert all("--hash=sha256:" in entry for entry in entries)
        return dict(entry.split()[0].split("==") for entry in entries)

    client, project = pins(CLUSTER / "gcp.lock"), pins(LOCK)
    assert "google-api-python-client" in client
    both = client.keys() & project.keys()
    assert {name: client[name] for name in both} == {name: project[name] for name in both}


@pytest.mark.parametrize("name", CLOUDS)
def test_the_images_have_a_version_and_it_is_the_locks(name):
    (version,) = re.findall(r"^ray==(\S+)", LOCK.read_text(), re.M)
    docker = read(name)["docker"]
    python = re.compile(rf"rayproject/ray:{re.escape(version)}-(py3\d+)-(cpu|gpu)")
    head, worker = (python.fullmatch(docker[one]) for one in ("head_image", "worker_image"))
    assert head and worker, "the images' Ray is not the lock's"
    assert head[1] == worker[1] and head[2] == "cpu" and worker[2] == "gpu"
    assert not re.search(r"image.*(:latest\b|/family/)", (CLUSTER / f"{name}.yaml").read_text())


def is_spot(name: str, node: dict[str, Any]) -> bool:
    if name == "aws":
        return node.get("InstanceMarketOptions") == {"MarketType": "spot"}
    return node["scheduling"].get("provisioningModel") == "SPOT"


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_come_only_when_asked_for_and_may_be_on_demand(name):
    text = (CLUSTER / f"{name}.yaml").read_text()
    comment = re.findall(r"(?:^  #.*\n)+", text.split("Ray's source).\n")[1], re.M)[0]
    without = text.replace(comment, re.sub(r"^  # ", "  ", comment, flags=re.M))
    for written, names in ((text, {"gpu_spot"}), (without, {"gpu_spot", "gpu_on_demand"})):
        (config,) = strict.load_all(written)
        types = prepared(config)["available_node_types"]
        assert set(types) == names | {"head"}
        assert types["head"]["max_workers"] == 0
        assert {types[one]["min_workers"] for one in names} == {0}
        assert is_spot(name, types["gpu_spot"]["node_config"])
    spot, on_demand = types["gpu_spot"], types["gpu_on_demand"]
    assert not is_spot(name, on_demand["node_config"])
    assert spot["resources"] == on_demand["resources"], "else it is no replacement"


def test_machines_that_one_has_all_join():
    config = prepared(read("on_premise"))
    (only,) = config["available_node_types"].values()
    assert only["min_workers"] == only["max_workers"] == len(config["provider"]["worker_ips"])


def test_google_knows_every_field_of_the_nodes():
    """Against the description of its API that comes with Google's client."""
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
        for key, one in value.items():
            assert key in schema["properties"], f"{key} is not a field"
            check_google(one, schemas, schema["properties"][key])
    elif isinstance(value, list):
        assert schema["type"] == "array"
        for one in value:
            check_google(one, schemas, schema["items"])
