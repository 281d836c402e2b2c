"""The manifests for KubeRay: valid, protected by the token, with enough shared memory."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import strict
import yaml
from commands import check, job_commands

from fer_ray.runtime import resources

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = ROOT / "cluster" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "kuberay"
JOBS = ("train", "tune", "predict")
NAMES = ("cluster", *JOBS)
FILES = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """Validates manifests of a kind as an API server does in strict mode."""
    file = SCHEMAS / FILES[kind]
    if not file.exists():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS.relative_to(ROOT.parent)}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast on these files
    definition = yaml.load(file.read_text(), Loader=loader)
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = strict.json_schema(version["schema"]["openAPIV3Schema"])
    # the API server's own schema, which that of a custom resource does not repeat
    names = {"name": {"type": "string"}, "namespace": {"type": "string"}}
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {**names, "labels": {"type": "object"}, "annotations": {"type": "object"}},
    }
    return jsonschema.Draft202012Validator(schema)


def manifest(name: str) -> dict[str, Any]:
    return copy.deepcopy(strict.load(MANIFESTS / f"{name}.yaml"))


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The specifications of a manifest's pods, by their role."""
    cluster = cluster_of(manifest)
    templates = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    templates["head"] = cluster["headGroupSpec"]["template"]
    if manifest["kind"] == "RayJob":
        templates["submitter"] = manifest["spec"]["submitterPodTemplate"]
    return {name: template["spec"] for name, template in templates.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_is_valid(name):
    content = manifest(name)
    assert content["apiVersion"] == "ray.io/v1" and content["metadata"]["namespace"] == "fer-ray"
    validator(content["kind"]).validate(content)


WRONG = {
    "unknown field": (lambda spec: spec.update(enableAutoscaling=True), "enableAutoscaling"),
    "unknown mode": (lambda spec: spec["authOptions"].update(mode="tokens"), "'tokens'"),
    "no pods": (lambda spec: spec["headGroupSpec"].pop("template"), "'template' is a required"),
    "number for text": (
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 2}),
        "2 is not of type 'string'",
    ),
    "unknown field of a pod": (
        lambda spec: spec["headGroupSpec"]["template"]["spec"].update(securityContexts={}),
        "securityContexts",
    ),
    "unknown field of a container": (
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(
            volumeMount=[]
        ),
        "volumeMount",
    ),
    "no such quantity": (
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"][
            "limits"
        ].update(memory="12 GB"),
        "'12 GB'",
    ),
}


@pytest.mark.parametrize("name", ["cluster", "train"])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_is_refused(case, name):
    content = manifest(name)
    change, expected = WRONG[case]
    change(cluster_of(content))
    messages = [error.message for error in validator(content["kind"]).iter_errors(content)]
    messages += [
        below.message
        for error in validator(content["kind"]).iter_errors(content)
        for below in error.context or []
    ]
    assert any(expected in message for message in messages), messages


def test_a_duplicate_key_is_refused():
    text = (MANIFESTS / "cluster.yaml").read_text()
    twice = text.replace("    mode: token", "    mode: token\n    mode: disabled", 1)
    with pytest.raises(yaml.YAMLError, match="mode given twice"):
        strict.load_all(twice)


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_on_the_cluster_of_cluster_yaml(name):
    assert cluster_of(manifest(name)) == manifest("cluster")["spec"]


@pytest.mark.parametrize("name", JOBS)
def test_the_command_is_valid(name):
    entrypoint = manifest(name)["spec"]["entrypoint"]
    (command,) = job_commands(entrypoint)
    assert command[0] == f"/app/jobs/{name}.py"
    flags = vars(check(command))
    assert str(flags.get("data") or "s3://BUCKET/").startswith("s3://BUCKET/")
    paths = [word for word in command if "/" in word and not word.startswith("/app/")]
    assert paths and all(path.startswith("s3://BUCKET/") for path in paths)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_is_required_and_workers_scale_from_zero(name):
    cluster = cluster_of(manifest(name))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (version,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert cluster["rayVersion"] == version


def unprivileged(pod: dict[str, Any]) -> bool:
    """Whether a namespace that enforces the restricted profile admits the pod."""
    whole = pod["securityContext"]
    containers = [*pod["containers"], *pod.get("initContainers", [])]
    return (
        whole.get("runAsNonRoot") is True
        and whole.get("runAsUser", 0) > 0
        and whole.get("seccompProfile") == {"type": "RuntimeDefault"}
        and all(
            container["securityContext"].get("allowPrivilegeEscalation") is False
            and container["securityContext"].get("capabilities") == {"drop": ["ALL"]}
            and not container["securityContext"].get("privileged")
            for container in containers
        )
    )


@pytest.mark.parametrize("name", NAMES)
def test_pods_have_no_privileges(name):
    for pod in pods(manifest(name)).values():
        assert unprivileged(pod)
        for change in ({"runAsNonRoot": False}, {"runAsUser": 0}, {"seccompProfile": {}}):
            assert not unprivileged(
                {**pod, "securityContext": {**pod["securityContext"], **change}}
            )


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_without_a_working_gpu_does_not_start_ray(name):
    """A pod's containers start after its init containers have succeeded."""
    described = pods(manifest(name))
    (check,) = described["gpu"]["initContainers"]
    (worker,) = described["gpu"]["containers"]
    assert check["command"] == ["nvidia-smi", "-L"] and check["image"] == worker["image"]
    assert check["resources"]["limits"]["nvidia.com/gpu"] == "1", "it would see no GPU"
    assert "initContainers" not in described["head"]


@pytest.mark.parametrize("name", NAMES)
def test_jobs_know_how_far_the_cluster_may_grow(name):
    described, (group,) = pods(manifest(name)), cluster_of(manifest(name))["workerGroupSpecs"]
    limits = {
        role: described[role]["containers"][0]["resources"]["limits"] for role in ("head", "gpu")
    }
    most = group["maxReplicas"]
    cpus = int(limits["head"]["cpu"]) + most * int(limits["gpu"]["cpu"])
    (variable,) = described["head"]["containers"][0]["env"]
    assert variable == {"name": resources.MAXIMUM, "value": f"CPU={cpus},GPU={most}"}


def test_the_trials_of_a_worker_leave_room_in_its_memory_and_cpus():
    (command,) = job_commands(manifest("tune")["spec"]["entrypoint"])
    flags = vars(check(command))
    limits = pods(manifest("tune"))["gpu"]["containers"][0]["resources"]["limits"]
    num_trials = round(1 / flags["gpus_per_trial"])
    assert num_trials * flags["scaling.cpus_per_worker"] <= int(limits["cpu"]) - 1
    assert num_trials * 4 * 2**30 <= size(limits["memory"]) - 2 * 2**30


def size(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi)", quantity).groups()
    return int(number) * 2 ** {"Ki": 10, "Mi": 20, "Gi": 30}[unit]


@pytest.mark.parametrize("name", NAMES)
def test_the_object_store_fits_into_shared_memory_and_that_into_the_pod(name):
    cluster = cluster_of(manifest(name))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = (each for each in container["volumeMounts"] if each["mountPath"] == "/dev/shm")
        (volume,) = (each for each in pod["volumes"] if each["name"] == mount["name"])
        assert volume["emptyDir"]["medium"] == "Memory"
        shared = size(volume["emptyDir"]["sizeLimit"])
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < shared < size(container["resources"]["limits"]["memory"]) / 2


def test_the_namespace_admits_only_such_pods_and_few_connections():
    documents = strict.load_all((MANIFESTS / "namespace.yaml").read_text())
    namespace, *accounts, policy = documents
    labels = namespace["metadata"]["labels"]
    assert labels == {"pod-security.kubernetes.io/enforce": "restricted"}
    named = {account["metadata"]["name"] for account in accounts}
    used = {
        pod.get("serviceAccountName") for name in NAMES for pod in pods(manifest(name)).values()
    }
    assert used - {None} == named
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert {each["metadata"]["namespace"] for each in (*accounts, policy)} == {"fer-ray"}
