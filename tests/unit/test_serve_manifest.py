"""`launch/k8s/serve.yaml` fits the server: options, paths, port, time to drain, and what a pod may do."""

import json
import pathlib

import pytest
import yaml

from gpsd_dist.serve.__main__ import parse
from gpsd_dist.serving.messages import PATHS

REPO_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def manifests():
    loaded = yaml.safe_load_all((REPO_ROOT / "launch" / "k8s" / "serve.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in loaded}


@pytest.fixture(scope="module")
def pod(manifests):
    return manifests["Deployment"]["spec"]["template"]["spec"]


def test_options_are_options_of_the_server_and_it_can_drain_in_time(pod):
    (container,) = pod["containers"]
    args = parse(container["args"])
    assert args.host == "0.0.0.0" and args.port == container["ports"][0]["containerPort"]
    assert args.workers == int(container["resources"]["limits"]["cpu"])
    assert args.linger_s + args.drain_s < pod["terminationGracePeriodSeconds"]
    readiness = container["readinessProbe"]
    assert args.linger_s > 2 * readiness["periodSeconds"] * readiness["failureThreshold"]
    mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert str(args.artefact.parent) in mounted and mounted[str(args.artefact.parent)]["readOnly"]
    assert {mount["name"] for mount in mounted.values()} == {volume["name"] for volume in pod["volumes"]}


def test_probes_ask_paths_that_there_are(pod):
    (container,) = pod["containers"]
    for probe, path in (("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
        asked = container[probe]["httpGet"]
        assert asked == {"path": f"/v2/health/{path}", "port": "http"} and asked["path"] in PATHS


def test_a_pod_may_do_nothing_but_serve(pod):
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} == set(container["resources"]["limits"]) == set(container["resources"]["requests"])


def test_service_and_policy_choose_these_pods(manifests):
    assert set(manifests) == {"Deployment", "Service", "NetworkPolicy"}
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels and policy["egress"] == []
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": 8080}] and rule["from"]


def test_the_image_is_the_target_of_the_dockerfile(pod):
    (container,) = pod["containers"]
    dockerfile = (REPO_ROOT / "Dockerfile").read_text()
    assert container["image"] == "gpsd:serve" and " AS serve\n" in dockerfile
    command = dockerfile.split("CMD ")[1].splitlines()[0]
    assert parse(json.loads(command)).host == "0.0.0.0"
    assert 'ENTRYPOINT ["python", "-m", "gpsd_dist.serve"]' in dockerfile
