"""What Ray would do in an AWS account, against moto's mock of EC2 and IAM."""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Any

import pytest
import strict
import yaml
from test_cluster_configs import CLUSTER, prepared, read

boto3 = pytest.importorskip("boto3", reason="boto3 is absent")
moto = pytest.importorskip("moto", reason="moto is absent")

ACCOUNTS = itertools.count(100_000_000_001)
HOME = "203.0.113.7/32"
"""Where the user connects from."""


class _Template(strict._Loader):
    """Reads CloudFormation's short functions as {"Ref": …}, {"Sub": …}, {"GetAtt": …}."""


for _name in ("Ref", "Sub", "GetAtt"):
    _Template.add_constructor(
        f"!{_name}", lambda loader, node, name=_name: {name: loader.construct_scalar(node)}
    )


def template() -> dict[str, Any]:
    return yaml.load((CLUSTER / "aws_account.yaml").read_text(), Loader=_Template)


def resolve(value: Any, known: dict[str, str]) -> Any:
    """Replaces CloudFormation's functions by what they stand for.

    Raises:
        KeyError: for a name that the template does not define before.
    """
    if isinstance(value, list):
        return [resolve(one, known) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (function := next(iter(value))) in ("Ref", "GetAtt"):
        return known[value[function]]
    if set(value) == {"Sub"}:
        return re.sub(r"\$\{([\w.]+)\}", lambda found: known[found[1]], value["Sub"])
    return {key: resolve(one, known) for key, one in value.items()}


class Account:
    """Makes the template's resources one by one, as CloudFormation does, which moto has not."""

    def __init__(self, region: str) -> None:
        self.ec2 = boto3.client("ec2", region_name=region)
        self.iam = boto3.client("iam", region_name=region)
        self.s3 = boto3.client("s3", region_name="us-east-1")
        self.known = {"SshFrom": HOME, "Vpc": self.ec2.describe_vpcs()["Vpcs"][0]["VpcId"]}
        resources = template()["Resources"]
        order = ("Bucket", "Data", "WorkerRole", "Launch", "HeadRole", "SecurityGroup")
        for name in [*order, *(one for one in resources if one not in order)]:
            make = getattr(self, "_" + resources[name]["Type"].rpartition("::")[2])
            make(name, resolve(resources[name]["Properties"], self.known))

    def _Bucket(self, name: str, given: dict[str, Any]) -> None:
        bucket = f"fer-ray-{os.environ['MOTO_ACCOUNT_ID']}"  # names are unique in the world
        self.s3.create_bucket(Bucket=bucket)
        self.known |= {name: bucket, f"{name}.Arn": f"arn:aws:s3:::{bucket}"}

    def _ManagedPolicy(self, name: str, given: dict[str, Any]) -> None:
        made = self.iam.create_policy(
            PolicyName=name, PolicyDocument=json.dumps(given["PolicyDocument"])
        )
        self.known[name] = made["Policy"]["Arn"]

    def _Role(self, name: str, given: dict[str, Any]) -> None:
        policy = json.dumps(given["AssumeRolePolicyDocument"])
        made = self.iam.create_role(RoleName=given["RoleName"], AssumeRolePolicyDocument=policy)
        for arn in given["ManagedPolicyArns"]:
            self.iam.attach_role_policy(RoleName=given["RoleName"], PolicyArn=arn)
        self.known |= {name: given["RoleName"], f"{name}.Arn": made["Role"]["Arn"]}

    def _InstanceProfile(self, name: str, given: dict[str, Any]) -> None:
        (role,) = given["Roles"]
        profile = given["InstanceProfileName"]
        self.iam.create_instance_profile(InstanceProfileName=profile)
        self.iam.add_role_to_instance_profile(InstanceProfileName=profile, RoleName=role)

    def _SecurityGroup(self, name: str, given: dict[str, Any]) -> None:
        made = self.ec2.create_security_group(
            GroupName=given["GroupName"],
            Description=given["GroupDescription"],
            VpcId=given["VpcId"],
        )
        for rule in given["SecurityGroupIngress"]:
            self.ec2.authorize_security_group_ingress(GroupId=made["GroupId"], **rule)
        self.known |= {name: made["GroupId"], f"{name}.GroupId": made["GroupId"]}

    def _SecurityGroupIngress(self, name: str, given: dict[str, Any]) -> None:
        pair = [{"GroupId": given["SourceSecurityGroupId"]}]
        rule = {"IpProtocol": given["IpProtocol"], "UserIdGroupPairs": pair}
        self.ec2.authorize_security_group_ingress(GroupId=given["GroupId"], IpPermissions=[rule])


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """An empty AWS account, and a home for the key that Ray makes.

    Other tests keep their buckets in moto too, in this process: nothing is reset, and the account
    is a new one.
    """
    from ray.autoscaler._private.aws import utils

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("MOTO_ACCOUNT_ID", f"{next(ACCOUNTS)}")
    monkeypatch.setenv("HOME", str(tmp_path))
    mock = moto.mock_aws()
    mock.start(reset=False)
    utils.resource_cache.cache_clear()
    yield read("aws")["provider"]["region"]
    utils.resource_cache.cache_clear()
    mock.stop(remove_data=False)


def launched(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The instance of each node type, by its name, as EC2 describes it after Ray's launch."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = AWSNodeProvider.bootstrap_config(prepared(config))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    found = {}
    for name, node_type in config["available_node_types"].items():
        (instance,) = provider.create_node(node_type["node_config"], {"ray-node-name": name}, 1)
        client = provider.ec2.meta.client
        described = client.describe_instances(InstanceIds=[instance])
        found[name] = described["Reservations"][0]["Instances"][0]
    return found


def inbound(instance: dict[str, Any], region: str) -> list[dict[str, Any]]:
    client = boto3.client("ec2", region_name=region)
    groups = [one["GroupId"] for one in instance["SecurityGroups"]]
    described = client.describe_security_groups(GroupIds=groups)["SecurityGroups"]
    return [rule for group in described for rule in group["IpPermissions"]]


def open_to(rules: list[dict[str, Any]]) -> set[tuple[Any, str]]:
    """The ports and the networks outside of the cluster that reach them."""
    return {(rule.get("FromPort"), one["CidrIp"]) for rule in rules for one in rule["IpRanges"]}


def test_ray_launches_a_closed_head_and_spot_workers(cloud):
    Account(cloud)
    found = launched(read("aws"))
    profiles = {}
    for name, instance in found.items():
        profiles[name] = instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        rules = inbound(instance, cloud)
        assert open_to(rules) == {(22, HOME)}
        assert [rule for rule in rules if rule["IpProtocol"] == "-1"], "nodes reach each other"
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert instance["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/")
    assert profiles == {"head": "fer-ray-head", "gpu_spot": "fer-ray-worker"}
    assert found["gpu_spot"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in found["head"]


def test_a_group_that_ray_makes_itself_would_be_noticed(cloud):
    Account(cloud)
    config = read("aws")
    config["provider"]["security_group"]["GroupName"] = "another"
    rules = inbound(launched(config)["head"], cloud)
    assert (22, "0.0.0.0/0") in open_to(rules)


def test_a_field_that_ec2_does_not_know_would_be_noticed(cloud):
    Account(cloud)
    config = read("aws")
    config["available_node_types"]["head"]["node_config"]["InstanceTypes"] = "m7i.large"
    with pytest.raises(Exception, match="Unknown parameter in input"):
        launched(config)


def test_the_types_have_the_resources_that_jobs_ask_for(cloud):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = AWSNodeProvider.fillout_available_node_types_resources(prepared(read("aws")))
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 8 and "GPU" not in types["head"]["resources"]
    worker = types["gpu_spot"]["resources"]
    assert worker["CPU"] == 4 and worker["GPU"] == 1


def test_the_account_names_what_the_cluster_asks_for():
    resources = template()["Resources"]
    config = read("aws")
    group = resources["SecurityGroup"]["Properties"]["GroupName"]
    assert config["provider"]["security_group"]["GroupName"] == group
    statements = resources["Launch"]["Properties"]["PolicyDocument"]["Statement"]
    ends = next(one for one in statements if "ec2:TerminateInstances" in one["Action"])
    tag = ends["Condition"]["StringEquals"]["ec2:ResourceTag/ray-cluster-name"]
    assert tag == config["cluster_name"]
    assert resources["WorkerRole"]["Properties"]["ManagedPolicyArns"] == [{"Ref": "Data"}]


def test_a_name_that_the_template_does_not_define_would_be_noticed():
    wrong = template()["Resources"]["Launch"]
    with pytest.raises(KeyError, match=r"WorkerRole\.Arn"):
        resolve(wrong, {})
