"""What `ray up` would do in an AWS account, with moto's mock of EC2 and IAM."""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Any

import pytest
import strict
import yaml
from test_cluster_configs import CLUSTER, read, stated_maximum

boto3 = pytest.importorskip("boto3", reason="boto3 is absent")
moto = pytest.importorskip("moto", reason="moto is absent")

ACCOUNTS = itertools.count(100_000_000_001)
HOME = "203.0.113.7/32"
"""The network from which the user connects."""


class _Template(strict._Loader):
    """Reads CloudFormation's short functions as {"Ref": …}, {"Sub": …}, {"GetAtt": …}."""


for _name in ("Ref", "Sub", "GetAtt"):
    _Template.add_constructor(
        f"!{_name}", lambda loader, node, name=_name: {name: loader.construct_scalar(node)}
    )


def template() -> dict[str, Any]:
    return yaml.load((CLUSTER / "aws_account.yaml").read_text(), Loader=_Template)


def resolve(value: Any, known: dict[str, str]) -> Any:
    """Replaces CloudFormation's functions by their values.

    Raises:
        KeyError: if the template does not define a name before it is used.
    """
    if isinstance(value, list):
        return [resolve(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (function := next(iter(value))) in ("Ref", "GetAtt"):
        return known[value[function]]
    if set(value) == {"Sub"}:
        return re.sub(r"\$\{([\w.]+)\}", lambda match: known[match[1]], value["Sub"])
    return {key: resolve(item, known) for key, item in value.items()}


class Account:
    """Creates the template's resources in order, as CloudFormation does; moto does not."""

    def __init__(self, region: str) -> None:
        self.ec2 = boto3.client("ec2", region_name=region)
        self.iam = boto3.client("iam", region_name=region)
        self.s3 = boto3.client("s3", region_name="us-east-1")
        self.known = {"SshFrom": HOME, "Vpc": self.ec2.describe_vpcs()["Vpcs"][0]["VpcId"]}
        resources = template()["Resources"]
        order = ("Bucket", "Data", "WorkerRole", "Launch", "HeadRole", "SecurityGroup")
        for name in [*order, *(name for name in resources if name not in order)]:
            create = getattr(self, "_" + resources[name]["Type"].rpartition("::")[2])
            create(name, resolve(resources[name]["Properties"], self.known))

    def _Bucket(self, name: str, properties: dict[str, Any]) -> None:
        bucket = f"fer-ray-{os.environ['MOTO_ACCOUNT_ID']}"  # names of buckets are globally unique
        self.s3.create_bucket(Bucket=bucket)
        self.known |= {name: bucket, f"{name}.Arn": f"arn:aws:s3:::{bucket}"}

    def _ManagedPolicy(self, name: str, properties: dict[str, Any]) -> None:
        created = self.iam.create_policy(
            PolicyName=name, PolicyDocument=json.dumps(properties["PolicyDocument"])
        )
        self.known[name] = created["Policy"]["Arn"]

    def _Role(self, name: str, properties: dict[str, Any]) -> None:
        policy = json.dumps(properties["AssumeRolePolicyDocument"])
        created = self.iam.create_role(
            RoleName=properties["RoleName"], AssumeRolePolicyDocument=policy
        )
        for arn in properties["ManagedPolicyArns"]:
            self.iam.attach_role_policy(RoleName=properties["RoleName"], PolicyArn=arn)
        self.known |= {name: properties["RoleName"], f"{name}.Arn": created["Role"]["Arn"]}

    def _InstanceProfile(self, name: str, properties: dict[str, Any]) -> None:
        (role,) = properties["Roles"]
        profile = properties["InstanceProfileName"]
        self.iam.create_instance_profile(InstanceProfileName=profile)
        self.iam.add_role_to_instance_profile(InstanceProfileName=profile, RoleName=role)

    def _SecurityGroup(self, name: str, properties: dict[str, Any]) -> None:
        created = self.ec2.create_security_group(
            GroupName=properties["GroupName"],
            Description=properties["GroupDescription"],
            VpcId=properties["VpcId"],
        )
        for rule in properties["SecurityGroupIngress"]:
            self.ec2.authorize_security_group_ingress(GroupId=created["GroupId"], **rule)
        self.known |= {name: created["GroupId"], f"{name}.GroupId": created["GroupId"]}

    def _SecurityGroupIngress(self, name: str, properties: dict[str, Any]) -> None:
        pair = [{"GroupId": properties["SourceSecurityGroupId"]}]
        rule = {"IpProtocol": properties["IpProtocol"], "UserIdGroupPairs": pair}
        self.ec2.authorize_security_group_ingress(
            GroupId=properties["GroupId"], IpPermissions=[rule]
        )


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The region of an empty AWS account, with a home for the SSH key that Ray creates.

    Other tests in this process keep their buckets in moto too: nothing is reset, and each test
    has a new account.
    """
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("MOTO_ACCOUNT_ID", f"{next(ACCOUNTS)}")
    monkeypatch.setenv("HOME", str(tmp_path))
    mock = moto.mock_aws()
    mock.start(reset=False)
    yield read("aws")["provider"]["region"]
    mock.stop(remove_data=False)


def launched(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The instance of each node type, by its name, as EC2 describes it after the launch.

    Ray validates and completes the configuration; its launch of an instance is repeated here.
    """
    config = bootstrapped(config)
    client = boto3.client("ec2", region_name=config["provider"]["region"])
    instances = {}
    for name, node_type in config["available_node_types"].items():
        node = dict(node_type["node_config"])
        subnet, *_ = node.pop("SubnetIds")
        started = client.run_instances(**node, SubnetId=subnet, MinCount=1, MaxCount=1)
        ids = [instance["InstanceId"] for instance in started["Instances"]]
        described = client.describe_instances(InstanceIds=ids)
        (instances[name],) = described["Reservations"][0]["Instances"]
    return instances


def bootstrapped(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` validates and completes it, with Ray's own code."""
    from ray.autoscaler import sdk

    return sdk.bootstrap_config(config, no_config_cache=True)


def inbound(instance: dict[str, Any], region: str) -> list[dict[str, Any]]:
    client = boto3.client("ec2", region_name=region)
    groups = [group["GroupId"] for group in instance["SecurityGroups"]]
    described = client.describe_security_groups(GroupIds=groups)["SecurityGroups"]
    return [rule for group in described for rule in group["IpPermissions"]]


def open_to(rules: list[dict[str, Any]]) -> set[tuple[Any, str]]:
    """The open ports and the networks outside of the cluster that reach them."""
    return {(rule.get("FromPort"), net["CidrIp"]) for rule in rules for net in rule["IpRanges"]}


def test_the_head_is_protected_and_workers_are_spot_instances(cloud):
    Account(cloud)
    instances = launched(read("aws"))
    profiles = {}
    for name, instance in instances.items():
        profiles[name] = instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        rules = inbound(instance, cloud)
        assert open_to(rules) == {(22, HOME)}
        assert [rule for rule in rules if rule["IpProtocol"] == "-1"], "nodes reach each other"
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/")
    assert profiles == {"head": "fer-ray-head", "gpu_spot": "fer-ray-worker"}
    assert instances["gpu_spot"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in instances["head"]


def test_a_security_group_that_ray_creates_is_open(cloud):
    Account(cloud)
    config = read("aws")
    config["provider"]["security_group"]["GroupName"] = "another"
    rules = inbound(launched(config)["head"], cloud)
    assert (22, "0.0.0.0/0") in open_to(rules)


def test_a_field_that_ec2_does_not_know_is_refused(cloud):
    Account(cloud)
    config = read("aws")
    config["available_node_types"]["head"]["node_config"]["InstanceTypes"] = "m7i.large"
    with pytest.raises(Exception, match="Unknown parameter in input"):
        launched(config)


def test_the_node_types_have_the_resources_that_jobs_request(cloud):
    Account(cloud)
    types = bootstrapped(read("aws"))["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 8 and "GPU" not in types["head"]["resources"]
    worker = types["gpu_spot"]["resources"]
    assert worker["CPU"] == 4 and worker["GPU"] == 1
    most = read("aws")["max_workers"]
    assert stated_maximum("aws") == f"CPU={8 + most * 4},GPU={most}"


def test_the_account_defines_the_names_that_the_cluster_uses():
    resources = template()["Resources"]
    config = read("aws")
    group = resources["SecurityGroup"]["Properties"]["GroupName"]
    assert config["provider"]["security_group"]["GroupName"] == group
    statements = resources["Launch"]["Properties"]["PolicyDocument"]["Statement"]
    terminate = next(each for each in statements if "ec2:TerminateInstances" in each["Action"])
    tag = terminate["Condition"]["StringEquals"]["ec2:ResourceTag/ray-cluster-name"]
    assert tag == config["cluster_name"]
    assert resources["WorkerRole"]["Properties"]["ManagedPolicyArns"] == [{"Ref": "Data"}]


def test_a_name_that_the_template_does_not_define_is_refused():
    wrong = template()["Resources"]["Launch"]
    with pytest.raises(KeyError, match=r"WorkerRole\.Arn"):
        resolve(wrong, {})
