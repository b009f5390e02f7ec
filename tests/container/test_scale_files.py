"""docker/scale/ and docker/kubernetes/ hold what they promise: read as their programs would."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.support.schemas import faults
from tools import image_check_compose as compose

ROOT = Path(__file__).resolve().parents[2]
SCALE = ROOT / "docker" / "scale"
HAPROXY = [SCALE / "compose.yaml"]
NGINX = [*HAPROXY, SCALE / "compose.nginx.yaml"]
REPLICAS = ["klein-0", "klein-1", "klein-2"]
MANIFESTS = ROOT / "docker" / "kubernetes" / "klein.yaml"
SCALED = ROOT / "docker" / "kubernetes" / "keda" / "scaledobject.yaml"
FILES = pytest.mark.parametrize("files", [HAPROXY, NGINX], ids=["haproxy", "nginx"])


def services(files: list[Path], **environ: str) -> dict[str, Any]:
    """What the files start."""
    found: dict[str, Any] = compose.load(files, environ)["services"]
    return found


@FILES
def test_the_files_fit_the_compose_specification(files: list[Path], tmp_path: Path) -> None:
    """Merged, with what they extend and every variable replaced."""
    merged = tmp_path / "compose.json"
    merged.write_text(json.dumps(compose.load(files, {})))

    assert faults("vendor.compose-spec", merged) == ""


def test_a_replica_is_the_service_of_the_roots_file_but_for_its_place() -> None:
    """With its confinement, its settings and its limits; another card, no port, an address."""
    one = compose.load([ROOT / "compose.yaml"], {})["services"]["klein"]
    own = {"deploy", "environment", "ports", "networks", "build"}
    for number, name in enumerate(REPLICAS):
        replica = services(HAPROXY)[name]
        (device,) = replica["deploy"]["resources"]["reservations"]["devices"]

        assert "ports" not in replica
        assert Path(replica["build"]["context"]) == ROOT
        assert device == {
            "driver": "nvidia",
            "device_ids": [str(number)],
            "capabilities": ["gpu"],
        }
        assert {key: replica[key] for key in replica.keys() - own} == {
            key: one[key] for key in one.keys() - own
        }
        assert replica["environment"].keys() == one["environment"].keys()


@FILES
def test_the_replicas_believe_the_proxy_and_nobody_else(files: list[Path]) -> None:
    """Its address in their network; links to pictures lead to each by its name."""
    started = services(files)
    proxy = started["proxy"]["networks"]["default"]["ipv4_address"]
    for name in REPLICAS:
        settings = Settings.read(compose.environment(started[name], {}))

        assert settings.trusted_proxies == (proxy,)
        assert settings.public_url == f"http://127.0.0.1:8000/{name}"
        assert settings.allowed_hosts == ("klein",)
    assert started["proxy"]["networks"]["default"]["aliases"] == ["klein"]


@FILES
def test_each_replica_has_an_address_that_the_proxy_knows(files: list[Path]) -> None:
    """Different ones of the one network, also of another than the usual."""
    for environ in {}, {"KLEIN_SUBNET": "10.9.8"}:
        document = compose.load(files, environ)
        started = document["services"]
        (subnet,) = document["networks"]["default"]["ipam"]["config"]
        addresses = {
            name: started[name]["networks"]["default"]["ipv4_address"]
            for name in (*REPLICAS, "proxy")
        }

        assert started["proxy"]["extra_hosts"] == {name: addresses[name] for name in REPLICAS}
        assert len(set(addresses.values())) == 4
        network = ipaddress.ip_network(subnet["subnet"])
        assert all(ipaddress.ip_address(each) in network for each in addresses.values())


@FILES
def test_only_the_proxy_is_published_and_that_on_loopback(files: list[Path]) -> None:
    """As confined as the services are, from an image of one version."""
    started = services(files)
    proxy = started["proxy"]

    assert proxy["ports"] == ["127.0.0.1:8000:8000"]
    assert [name for name, each in started.items() if "ports" in each] == ["proxy"]
    assert (proxy["read_only"], proxy["cap_drop"]) == (True, ["ALL"])
    assert proxy["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[\w/-]+:\d+\.\d+\.\d+", proxy["image"])
    (volume,) = proxy["volumes"]
    assert (SCALE / volume.split(":")[0]).is_file()
    assert volume.endswith(":ro")


@pytest.mark.parametrize("file", ["haproxy.cfg", "nginx.conf"])
def test_both_proxies_know_the_same_services(file: str) -> None:
    """Those that compose starts."""
    text = (SCALE / file).read_text()

    assert re.findall(r"^ +server .*?(klein-\d+):8000", text, re.M) == REPLICAS
    assert sorted(set(re.findall(r"\bklein-\d+\b", text))) == REPLICAS


def manifests() -> dict[str, dict[str, Any]]:
    """Kubernetes' objects by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFESTS.read_text())}


def pod() -> dict[str, Any]:
    """What a pod is made of."""
    spec: dict[str, Any] = manifests()["Deployment"]["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    """The only one."""
    (found,) = pod()["containers"]
    return found


def test_the_pods_settings_are_the_services() -> None:
    """On all interfaces with keys; without links, since each pod keeps its own pictures."""
    given = {each["name"]: each["value"] for each in container()["env"]}
    keys = given.pop("KLEIN_API_KEYS_FILE")
    settings = Settings.read(given | {"KLEIN_API_KEYS": "a-key-of-a-pod"})

    assert (settings.host, settings.trust_network, settings.image_urls) == ("0.0.0.0", False, False)
    mounts = {each["name"]: each["mountPath"] for each in container()["volumeMounts"]}
    assert keys == f"{mounts['keys']}/keys"
    assert {"models", "tmp", "shm"} < mounts.keys()
    assert {each["name"] for each in pod()["volumes"]} == mounts.keys()
    assert mounts["models"] == "/models"


def test_kubernetes_adds_no_settings_of_its_own() -> None:
    """For a Service named klein it would set KLEIN_PORT and others, which the service refuses."""
    assert manifests()["Service"]["metadata"]["name"] == "klein"
    assert pod()["enableServiceLinks"] is False
    with pytest.raises(Exception, match="KLEIN_"):
        Settings.read({"KLEIN_PORT": "tcp://10.0.0.1:8000", "KLEIN_SERVICE_HOST": "10.0.0.1"})


def test_the_pod_is_confined() -> None:
    """By number, so that a cluster can see that it is not root; the image's user."""
    user = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.M)[-1]
    outer, inner = pod()["securityContext"], container()["securityContext"]

    assert (str(outer["runAsUser"]), str(outer["runAsGroup"])) == user
    assert (outer["runAsNonRoot"], outer["seccompProfile"]["type"]) == (True, "RuntimeDefault")
    assert inner == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["automountServiceAccountToken"] is False


def test_a_pod_has_a_card_and_the_time_to_finish() -> None:
    """One GPU, compose's memory, and its patience besides the seconds of preStop."""
    one = compose.load([ROOT / "compose.yaml"], {})["services"]["klein"]
    resources = container()["resources"]
    wait_s = container()["lifecycle"]["preStop"]["sleep"]["seconds"]

    assert resources["limits"]["nvidia.com/gpu"] == 1
    assert resources["limits"]["memory"] == one["mem_limit"].replace("g", "Gi")
    assert one["stop_grace_period"] == "630s"
    assert pod()["terminationGracePeriodSeconds"] >= wait_s + 630


def test_the_objects_belong_together() -> None:
    """Labels, ports and names that refer to one another."""
    found = manifests()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]

    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    claims = [each.get("persistentVolumeClaim", {}).get("claimName") for each in pod()["volumes"]]
    assert found["PersistentVolumeClaim"]["metadata"]["name"] in claims
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    assert ports == {"http": 8000}
    assert found["Service"]["spec"]["ports"][0]["targetPort"] in ports
    scaled = yaml.safe_load(SCALED.read_text())["spec"]["scaleTargetRef"]["name"]
    assert scaled == found["Deployment"]["metadata"]["name"]


def test_the_autoscaler_asks_for_metrics_that_there_are() -> None:
    """Both of them gauges; and never for no pod at all, since pods count what waits."""
    spec = yaml.safe_load(SCALED.read_text())["spec"]
    (trigger,) = spec["triggers"]
    names = set(re.findall(r"klein_\w+", trigger["metadata"]["query"]))
    page = (ROOT / "docs" / "metrics.md").read_text()

    assert names == {"klein_queue_size", "klein_requests_running"}
    assert all(f"| `{name}` | gauge |" in page for name in names)
    assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
    assert all(isinstance(value, str) for value in trigger["metadata"].values())


SCALED_OBJECT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "keda.sh/v1alpha1"},
        "kind": {"const": "ScaledObject"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["scaleTargetRef", "triggers"],
            "properties": {
                "scaleTargetRef": {"type": "object", "required": ["name"]},
                "minReplicaCount": {"type": "integer", "minimum": 0},
                "maxReplicaCount": {"type": "integer", "minimum": 1},
                "pollingInterval": {"type": "integer", "minimum": 1},
                "fallback": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["failureThreshold", "replicas"],
                    "properties": {
                        "failureThreshold": {"type": "integer"},
                        "replicas": {"type": "integer"},
                    },
                },
                "advanced": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"horizontalPodAutoscalerConfig": {"type": "object"}},
                },
                "triggers": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["type", "metadata"],
                        "properties": {
                            "type": {"const": "prometheus"},
                            "metadata": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["serverAddress", "query", "threshold"],
                                "properties": {
                                    name: {"type": "string"}
                                    for name in ("serverAddress", "query", "threshold")
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}
"""What KEDA's reference of ScaledObject and of the Prometheus trigger says of the keys used."""


def test_the_autoscaler_has_kedas_keys() -> None:
    """Its kind is none of Kubernetes' own; the behaviour below it is, and is checked as such."""
    import jsonschema

    jsonschema.validate(yaml.safe_load(SCALED.read_text()), SCALED_OBJECT)


@pytest.mark.system
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_kubernetes_takes_the_manifests(version: str, tmp_path: Path) -> None:
    """By its own schemas, with no key that it does not know; the autoscaler's behaviour as that of
    a HorizontalPodAutoscaler, which KEDA makes of it."""
    scaled = yaml.safe_load(SCALED.read_text())["spec"]
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "klein"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "klein"},
            "maxReplicas": scaled["maxReplicaCount"],
            **scaled["advanced"]["horizontalPodAutoscalerConfig"],
        },
    }
    made = tmp_path / "scaler.yaml"
    made.write_text(yaml.safe_dump(scaler))
    validate = Path(sys.executable).with_name("kubernetes-validate")
    assert validate.exists(), "kubernetes-validate is missing; run `make test-system`"
    command = [str(validate), "--strict", "--kubernetes-version", version]

    done = subprocess.run(
        [*command, str(MANIFESTS), str(made)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count(" passed for resource ") == 5


@pytest.mark.system
def test_the_autoscalers_query_adds_up(tmp_path: Path) -> None:
    """What waits and what is made, in all pods, as Prometheus reads it."""
    (trigger,) = yaml.safe_load(SCALED.read_text())["spec"]["triggers"]
    series = [("klein_queue_size", 4, 1), ("klein_requests_running", 1, 1)]
    test = {
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f'{name}{{instance="{pod}"}}', "values": f"{value}+0x3"}
                    for name, *values in series
                    for pod, value in enumerate(values)
                ],
                "promql_expr_test": [
                    {
                        "expr": trigger["metadata"]["query"],
                        "eval_time": "2m",
                        "exp_samples": [{"labels": "{}", "value": 7}],
                    }
                ],
            }
        ],
    }
    file = tmp_path / "query.yml"
    file.write_text(yaml.safe_dump(test))
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
