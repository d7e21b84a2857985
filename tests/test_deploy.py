"""The manifests of deploy/, as far as they can be judged without a cluster."""

from __future__ import annotations

import copy
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.serve.schema import ServeDeploySchema

from ultra.cli import config_from_args
from ultra.serve import gateway
from ultra.serve.limits import ServeArgs

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = "1.37"
CHECKPOINT = "s3://YOUR-BUCKET/ultra/train/checkpoint"

KUBERAY: dict[str, dict[str, Any]] = {
    "RayService": {
        "serveConfigV2": str,
        "upgradeStrategy": "UpgradeStrategy",
        "rayClusterDeletionDelaySeconds": int,
        "excludeHeadPodFromServeSvc": bool,
        "rayClusterConfig": "RayCluster",
    },
    "UpgradeStrategy": {"type": {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}},
    "RayJob": {
        "entrypoint": str,
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": "RayCluster",
    },
    "RayCluster": {
        "rayVersion": str,
        "authOptions": "Auth",
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": "Autoscaler",
        "headGroupSpec": "HeadGroup",
        "workerGroupSpecs": ["WorkerGroup"],
    },
    "Auth": {"mode": {"disabled", "token"}, "secretName": str},
    "Autoscaler": {"idleTimeoutSeconds": int, "securityContext": dict},
    "HeadGroup": {"rayStartParams": "Strings", "template": dict},
    "WorkerGroup": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "rayStartParams": "Strings",
        "labels": "Strings",
        "template": dict,
    },
}
"""What the manifests use of ray.io/v1, as the API reference of KubeRay 1.7.0 has it."""


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy" / name).read_text(encoding="utf-8")))


def serve_config() -> Any:
    return yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))


SERVICE, SERVICE_POLICY = load("rayservice.yaml")
JOB, JOB_POLICY = load("rayjob.yaml")
SERVED = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
CLUSTERS = {
    "service": SERVICE["spec"]["rayClusterConfig"],
    "job": JOB["spec"]["rayClusterSpec"],
}


def templates(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]


def containers(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for template in templates(cluster):
        yield from template["spec"]["containers"]


def check(value: Any, kind: Any, path: str) -> None:
    """Fail where a value is not what KUBERAY says."""
    if kind == "Strings":
        assert all(isinstance(text, str) for text in value.values()), path
    elif isinstance(kind, str):
        for name, inner in value.items():
            assert name in KUBERAY[kind], f"{path}.{name}"
            check(inner, KUBERAY[kind][name], f"{path}.{name}")
    elif isinstance(kind, list):
        for number, inner in enumerate(value):
            check(inner, kind[0], f"{path}[{number}]")
    elif isinstance(kind, set):
        assert value in kind, path
    else:
        assert type(value) is kind, path


def check_pod(template: dict[str, Any]) -> None:
    """Fail where Kubernetes would refuse a pod, or drop a field of it."""
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


# Schemas


@pytest.mark.parametrize("manifest", [SERVICE, JOB], ids=["service", "job"])
def test_kuberay_knows_every_field(manifest: dict[str, Any]) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    check(manifest["spec"], manifest["kind"], manifest["kind"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_kubernetes_takes_every_pod(name: str) -> None:
    for template in templates(CLUSTERS[name]):
        check_pod(template)


@pytest.mark.parametrize("policy", [SERVICE_POLICY, JOB_POLICY], ids=["service", "job"])
def test_kubernetes_takes_the_network_policies(policy: dict[str, Any]) -> None:
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)


def test_these_checks_can_fail() -> None:
    wrong = copy.deepcopy(SERVICE["spec"])
    wrong["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplica"] = 3
    with pytest.raises(AssertionError, match=r"workerGroupSpecs\[1\]\.maxReplica"):
        check(wrong, "RayService", "spec")
    template = copy.deepcopy(next(templates(CLUSTERS["job"])))
    template["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="enviroment"):
        check_pod(template)


# The endpoint


def test_the_endpoint_is_that_of_serve_config() -> None:
    wanted = serve_config()
    (application,) = wanted["applications"]
    wanted["proxy_location"] = "EveryNode"
    wanted["http_options"]["host"] = "0.0.0.0"
    application["args"]["models"] = dict.fromkeys(application["args"]["models"], CHECKPOINT)
    by_name = {d["name"]: d["ray_actor_options"] for d in application["deployments"]}
    by_name["Ingress"]["label_selector"] = {"part": "ingress"}
    for part, deployment in {"encoder": "EncoderReplica", "language": "LanguageReplica"}.items():
        application["args"][f"{part}_device"] = "cuda"
        by_name[deployment]["num_gpus"] = 1
    assert wanted == SERVED, "deploy/rayservice.yaml and serve_config.yaml differ"


def test_serve_takes_the_endpoint() -> None:
    (application,) = ServeDeploySchema.model_validate(SERVED).applications
    ServeArgs.model_validate(application.args)
    module, _, builder = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), builder))


def test_an_old_cluster_ends_its_answers_before_it_goes() -> None:
    delay_s = SERVICE["spec"]["rayClusterDeletionDelaySeconds"]
    assert delay_s > SERVED["http_options"]["request_timeout_s"]


def test_a_worker_ends_its_answers_before_it_goes() -> None:
    _head, *workers = templates(CLUSTERS["service"])
    for template in workers:
        (container,) = template["spec"]["containers"]
        pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pause_s >= SERVED["http_options"]["request_timeout_s"]
        assert template["spec"]["terminationGracePeriodSeconds"] > pause_s


# The clusters


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_is_the_one_of_the_image(name: str) -> None:
    assert CLUSTERS[name]["rayVersion"] == ray.__version__


def node_groups() -> dict[str, Any]:
    """Return the groups of the endpoint's pods as Ray's autoscaler reads them."""
    resource = {
        "metadata": {"name": "ultra", "namespace": "default"},
        "spec": CLUSTERS["service"],
    }
    groups: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)[
        "available_node_types"
    ]
    return groups


def test_the_ingress_has_pods_without_gpus() -> None:
    (application,) = SERVED["applications"]
    (ingress,) = [d for d in application["deployments"] if d["name"] == "Ingress"]
    options = ingress["ray_actor_options"]
    (group,) = [g for g in node_groups().values() if g["labels"] == options["label_selector"]]
    assert "GPU" not in group["resources"]
    most = ingress["autoscaling_config"]["max_replicas"] * options["num_cpus"]
    assert most <= group["max_workers"] * group["resources"]["CPU"]


def test_the_autoscaler_can_give_every_replica_a_place() -> None:
    groups = node_groups()
    assert groups["headgroup"]["resources"]["CPU"] == 0
    (application,) = SERVED["applications"]
    for bound in ("min", "max"):
        for kind in ("CPU", "GPU"):
            needed = sum(
                deployment["ray_actor_options"].get(f"num_{kind.lower()}s", 0)
                * deployment["autoscaling_config"][f"{bound}_replicas"]
                for deployment in application["deployments"]
            )
            there = sum(
                group["resources"].get(kind, 0) * group[f"{bound}_workers"]
                for group in groups.values()
            )
            assert there >= needed > 0, (bound, kind)


def test_the_job_s_command_is_understood_and_has_its_gpus() -> None:
    python, option, module, *args = shlex.split(JOB["spec"]["entrypoint"])
    assert (python, option, module) == ("python", "-m", "ray_jobs.train")
    train = config_from_args(module, args).train
    (group,) = CLUSTERS["job"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    limits = worker["resources"]["limits"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == train.num_workers
    assert limits["nvidia.com/gpu"] == train.gpus_per_worker
    assert int(limits["cpu"]) >= train.cpus_per_worker
    (volume,) = group["template"]["spec"]["volumes"]
    assert {"name": volume["name"], "mountPath": "/dev/shm"} in worker["volumeMounts"]


# Safety


@pytest.mark.parametrize("name", CLUSTERS)
def test_no_pod_is_root_or_reports_home(name: str) -> None:
    for template in templates(CLUSTERS[name]):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(CLUSTERS[name]):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_USAGE_STATS_ENABLED"]["value"] == "0"
        assert env["MLFLOW_DISABLE_TELEMETRY"]["value"] == "true"
    auth = CLUSTERS[name]["authOptions"]
    assert auth == {"mode": "token", "secretName": "ultra-ray-token"}


def test_every_pod_of_the_endpoint_has_its_keys_and_its_gateway() -> None:
    on_aws = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    path = f"{gateway.__name__}:{gateway.middlewares.__name__}"
    variable = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    assert f"--env {variable}={path}" in on_aws["docker"]["run_options"]
    for container in containers(CLUSTERS["service"]):
        env = {entry["name"]: entry for entry in container["env"]}
        assert env[variable]["value"] == path
        # A pod without the secret does not start, rather than be open to all.
        key = {"name": "ultra-api-keys", "key": "keys"}
        assert env["ULTRA_API_KEYS"]["valueFrom"] == {"secretKeyRef": key}


@pytest.mark.parametrize(
    ("name", "policy", "open_ports"),
    [("service", SERVICE_POLICY, [8000]), ("job", JOB_POLICY, [])],
)
def test_only_the_endpoint_is_open(
    name: str, policy: dict[str, Any], open_ports: list[int]
) -> None:
    own = policy["spec"]["podSelector"]
    assert all(t["metadata"]["labels"] == own["matchLabels"] for t in templates(CLUSTERS[name]))
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    among_themselves, operator, *rest = policy["spec"]["ingress"]
    assert among_themselves == {"from": [{"podSelector": own}]}
    (peer,) = operator["from"]
    assert peer.keys() == {"namespaceSelector", "podSelector"}
    # The label that the operator has from Helm and from kustomize alike.
    component = {"app.kubernetes.io/component": "kuberay-operator"}
    assert peer["podSelector"] == {"matchLabels": component}
    assert operator["ports"] == [{"port": 8265}]
    assert rest == [{"ports": [{"port": port}]} for port in open_ports]


# The image and the page


def test_the_image_fits_the_manifests() -> None:
    steps = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert re.findall(r"^FROM (.*)", steps, re.M) == [f"python:{version}-slim"]
    copied = [path for line in re.findall(r"^COPY (.*)", steps, re.M) for path in line.split()[:-1]]
    assert {"pyproject.toml", "requirements.lock", "ultra", "ray_jobs"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    let_in = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    assert let_in[1] == "*"
    assert {line[1:] for line in let_in if line.startswith("!")} == set(copied)
    (user,) = re.findall(r"^USER (\d+)", steps, re.M)
    pods = [template for cluster in CLUSTERS.values() for template in templates(cluster)]
    assert {t["spec"]["securityContext"]["runAsUser"] for t in pods} == {int(user)}


def test_the_page_lists_every_placeholder_and_secret() -> None:
    page = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    manifests = "".join((ROOT / "deploy" / f"ray{k}.yaml").read_text() for k in ("service", "job"))
    listed = set(re.findall(r"^\| `(YOUR-[A-Z-]+)` \|", page, re.M))
    assert listed == set(re.findall(r"YOUR-[A-Z]+(?:-[A-Z]+)*", manifests))
    secrets = set(re.findall(r"^\| `(ultra-[a-z0-9-]+)` \|", page, re.M))
    used = re.findall(r"secret(?:Name|Ref: {name|KeyRef: {name): ([\w-]+)", manifests)
    assert secrets == set(used)
    assert secrets == set(re.findall(r"secret generic ([\w-]+)", page))
