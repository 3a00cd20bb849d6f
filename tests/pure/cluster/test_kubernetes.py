"""Objects for kubectl: against the fields of Kubernetes' API, and what of a config and a user's words they hold."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.config import Shards, dump
from nmoe.errors import InputError
from nmoe.pure.cluster import kubernetes
from nmoe.pure.cluster.kubernetes import Cluster
from tests.pure.cluster.fields import faults
from tests.pure.cluster.jobs import RUN_RULE, TEXTS, config, job

CLUSTER = Cluster(image="registry.example/nmoe:gpu", claim="work", data_claim=None)
WITH_DATA = attrs.evolve(CLUSTER, data_claim="shards")


def training(**changes: Any) -> dict[str, Any]:
    """The objects of a training, by kind."""
    return {one["kind"]: one for one in kubernetes.training(job(**changes), CLUSTER, 20.0)}


def container(one: dict[str, Any]) -> dict[str, Any]:
    (only,) = one["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("cluster", [CLUSTER, WITH_DATA])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_object_is_one_of_kubernetes(cluster: Cluster, device: str) -> None:
    objects = (
        *kubernetes.training(job(2, 4, device=device), cluster, 20.0),
        *kubernetes.preparation("first", 5, "raw", "data/pretrain", cluster),
        *kubernetes.dashboard("first", "runs", cluster),
    )
    assert [one["kind"] for one in objects] == ["ConfigMap", "Service", "Job", "Job", "Deployment", "Service"]
    assert [fault for one in objects for fault in faults(one)] == []


def test_the_fields_refuse_what_is_wrong() -> None:
    good = training()["Job"]
    for path, value in (
        (("spec", "completions"), "2"),
        (("spec", "podFailurePolicy", "rules", 0, "action"), None),
        (("spec", "template", "spec", "containers", 0, "livenessprobe"), {}),
        (("spec", "template", "spec", "volumes", 1, "emptyDir", "size"), "1Gi"),
    ):
        bad = copy.deepcopy(good)
        inner: Any = bad
        for key in path[:-1]:
            inner = inner[key]
        inner.pop(path[-1], None) if value is None else inner.update({path[-1]: value})
        assert faults(bad), path


@settings(max_examples=30, deadline=None)
@given(
    name=st.from_regex(RUN_RULE, fullmatch=True),
    hosts=st.integers(1, 99),
    per_host=st.integers(1, 16),
    grace_s=st.floats(0.1, 1e5),
)
def test_hosts_times_gpus_are_the_ranks_and_names_resolve(name: str, hosts: int, per_host: int, grace_s: float) -> None:
    made = training(hosts=hosts, per_host=per_host, name=name, grace_s=grace_s)
    spec, pod, only = made["Job"]["spec"], made["Job"]["spec"]["template"]["spec"], container(made["Job"])
    assert spec["completions"] == spec["parallelism"] == hosts and spec["completionMode"] == "Indexed"
    assert only["resources"]["limits"]["nvidia.com/gpu"] == str(per_host)
    assert {f"--nnodes={hosts}", f"--nproc-per-node={per_host}"} <= set(only["args"])
    assert tomli.loads(made["ConfigMap"]["data"]["config.toml"])["parallel"]["ranks"] == hosts * per_host
    # a pod's host name is job-index, in the domain of the service that its subdomain names and its labels select
    service = made["Service"]["metadata"]["name"]
    assert f"--master-addr={made['Job']['metadata']['name']}-0.{service}" in only["args"]
    assert pod["subdomain"] == service and made["Service"]["spec"]["clusterIP"] == "None"
    labels = spec["template"]["metadata"]["labels"]
    assert made["Service"]["spec"]["selector"].items() <= labels.items()
    assert all(len(value) <= 63 for value in labels.values())
    assert grace_s + 10 < pod["terminationGracePeriodSeconds"] <= grace_s + 16
    assert faults(made["Job"]) == []


def test_the_config_is_the_one_that_was_read() -> None:
    changes: dict[str, Any] = {"root": 'my "runs" $(X) `id`', "grace_s": 61.5}
    made = training(**changes)
    assert made["ConfigMap"]["data"]["config.toml"] == dump(config(ranks=8, experts=1, **changes))
    mounted = {mount["name"]: mount["mountPath"] for mount in container(made["Job"])["volumeMounts"]}
    assert mounted == {"work": "/workspace", "shm": "/dev/shm", "config": "/etc/nmoe"}
    assert container(made["Job"])["args"][-1] == "/etc/nmoe/config.toml"


def test_exit_codes_decide_what_follows() -> None:
    policy = {
        code: rule["action"]
        for rule in training()["Job"]["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ())
    }
    assert policy == {75: "Ignore", 2: "FailJob", 5: "FailJob", 6: "FailJob"}
    assert training(hosts=4)["Job"]["spec"]["template"]["spec"]["restartPolicy"] == "Never", "a policy requires it"


def probed(probe: dict[str, Any], folder: Path) -> int:
    """Exit code of a probe, with the folders of a pod replaced by `folder`."""
    places = {"/tmp/started": str(folder / "started"), "/workspace/": f"{folder}/"}
    command: list[str] = probe["exec"]["command"]
    for old, new in places.items():
        command = [part.replace(old, new) for part in command]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder of a pod with a run whose root is a shell's nightmare, and its container."""
    root = "a 'b' \"c\" $(touch x) `touch y`"
    (tmp_path / root / "first").mkdir(parents=True)
    yield tmp_path, container(training(root=root)["Job"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [root, "started"]


def test_a_pod_lives_while_the_heart_beats(pod: tuple[Path, dict[str, Any]]) -> None:
    folder, only = pod
    record = next(folder.iterdir()) / "first" / "run.json"
    (folder / "started").touch()
    assert probed(only["startupProbe"], folder) != 0, "no heartbeat yet"
    record.touch()
    now = record.stat().st_mtime
    for age, started, alive in ((2, 1, False), (2, 3, True), (18, 30, True), (25, 30, False)):
        for path, seconds in ((record, age), (folder / "started", started)):
            subprocess.run(["touch", "-d", f"@{now - seconds}", str(path)], check=True)
        probe = only["startupProbe"] if age == 2 else only["livenessProbe"]
        assert (probed(probe, folder) == 0) == alive, (age, started)


PATHS = TEXTS.filter(kubernetes.inside)


@given(source=PATHS, out=PATHS)
def test_any_path_reaches_the_preparation_as_it_is(source: str, out: str) -> None:
    (one,) = kubernetes.preparation("first", 3, source, out, CLUSTER)
    # Kubernetes makes $ of $$, and replaces $(NAME)
    command = [part.replace("$$", "\0") for part in container(one)["command"]]
    assert not any("$" in part for part in command)
    assert [part.replace("\0", "$") for part in command] == ["nmoe", "data", "prep", source, out]
    assert container(one)["args"] == ["--worker=$(JOB_COMPLETION_INDEX)/3"]
    assert one["spec"]["completions"] == one["spec"]["parallelism"] == 3


def test_the_dashboard_only_reads() -> None:
    deployment, service = kubernetes.dashboard("first", "runs", WITH_DATA)
    only = container(deployment)
    assert all(mount["readOnly"] for mount in only["volumeMounts"])
    assert only["command"] + only["args"] == ["nmoe", "viz", "--runs=runs", "--host=0.0.0.0", "--port=6543"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


@pytest.mark.parametrize(
    ("cluster", "changes", "problem"),
    [
        ({"claim": "My_Claim"}, {}, "--claim: expected the name of a claim, .* got 'My_Claim'"),
        ({"data_claim": ""}, {}, "--data-claim: expected the name of a claim, .* got ''"),
        ({"image": "a b"}, {}, "--image: expected the name of an image, got 'a b'"),
        ({"image": "-x"}, {}, "--image: expected the name of an image, got '-x'"),
        ({}, {"root": "/runs"}, "run.root: expected a path inside the claim, .* got '/runs'.*=runs$"),
        ({}, {"root": "~/runs"}, "run.root: expected a path inside the claim"),
        ({}, {"root": "../runs"}, "run.root: expected a path inside the claim"),
    ],
)
def test_what_no_cluster_could_mount_is_refused(cluster: dict[str, Any], changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        kubernetes.plan_cluster(config(**changes), attrs.evolve(CLUSTER, **cluster))


def test_data_outside_of_the_claim_is_refused() -> None:
    made = config()
    made = attrs.evolve(made, data=attrs.evolve(made.data, source=Shards(path="/mnt/shards")))
    with pytest.raises(InputError, match="data.source.path: expected a path inside the claim, .*=data/prepared$"):
        kubernetes.plan_cluster(made, CLUSTER)
    with pytest.raises(InputError, match="--prepare: expected a path inside the claim"):
        kubernetes.preparation("first", 3, "/raw", "data/pretrain", CLUSTER)
