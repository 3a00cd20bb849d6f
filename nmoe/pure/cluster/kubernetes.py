"""Objects for `kubectl apply`, as JSON, which kubectl reads as it reads YAML."""

from __future__ import annotations

import math
import re
from typing import Any

import attrs

from nmoe.config import Config, dump
from nmoe.errors import InputError
from nmoe.pure.cluster.job import EXIT_AGAIN, EXITS_FOR_GOOD, Job, label, torchrun

HOME = "/workspace"
"""Folder that a pod works in: the claim is mounted there, and the paths of the config start from it."""

CONFIG = "/etc/nmoe/config.toml"
USER = 10001
"""User and group of the images in docker/."""

PORT = 29500
"""Where the first host of a training listens."""

VIZ_PORT = 6543
PROBE_S = 10
PROBES = 3
"""Probes in a row that a pod may fail."""

STARTING_S = 1800
"""Until the first heartbeat: as long as a rank waits for another before the first step."""

FAILURES = 3
"""Pods of a host that may fail in other ways than by exit code 75, before the job counts as failed."""

STARTED = "/tmp/started"
"""A file that is made when a container starts: run.json may be one of an earlier attempt."""

Object = dict[str, Any]


@attrs.frozen(kw_only=True)
class Cluster:
    """What the config does not know of a cluster.

    image       that has nmoe, see docker/
    claim       PersistentVolumeClaim that all hosts mount as their working folder: runs, caches and data
    data_claim  another one for the folder `data` in it; None: it is in the first
    """

    image: str
    claim: str
    data_claim: str | None


def plan_cluster(config: Config, cluster: Cluster) -> Cluster:
    """The cluster, for a valid config.

    Raises:  InputError for names that are none, and for paths of the config that lie outside of the claim.
    """
    problems: list[str] = []
    for option, name in (("--claim", cluster.claim), ("--data-claim", cluster.data_claim)):
        if name is not None and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name):
            problems.append(
                f"{option}: expected the name of a claim, letters a to z, digits and '-', got {name!r}; see "
                "`kubectl get pvc`"
            )
    if not re.fullmatch(r"[\w][\w./:@-]*", cluster.image, re.ASCII):
        problems.append(f"--image: expected the name of an image, got {cluster.image!r}; write REGISTRY/NAME:TAG")
    path: str | None = getattr(config.data.source, "path", None)
    for key, value in (("run.root", config.run.root), ("data.source.path", path)):
        if value is not None and not inside(value):
            problems.append(
                f"{key}: expected a path inside the claim, which is mounted as the working folder, got {value!r}; "
                f"write a relative one without '..', such as --{key}={'runs' if key == 'run.root' else 'data/prepared'}"
            )
    if problems:
        raise InputError(*problems)
    return cluster


def inside(path: str) -> bool:
    """Whether a path stays in the working folder."""
    return path != "" and path[0] not in "/~" and ".." not in path.split("/")


def training(job: Job, cluster: Cluster, lost_after_s: float) -> tuple[Object, ...]:
    """An indexed Job with a pod a host, the headless Service by which the pods reach the first one, and the config.

    lost_after_s  age of a heartbeat above which the run counts as dead
    """
    name = label(job.name)
    arguments = (
        "--node-rank=$(JOB_COMPLETION_INDEX)",
        f"--master-addr={name}-0.{name}",
        f"--master-port={PORT}",
        *torchrun(job, CONFIG, ()),
    )
    record = f"{HOME}/{job.config.run.root}/{job.name}/run.json"
    age = '[ "$(($(date +%s) - $(stat -c %Y "$0")))" -le "$1" ]'
    container: Object = {
        **_container("train", cluster),
        # The shell is replaced by torchrun, so that SIGTERM reaches it.
        "command": ["sh", "-c", f'touch {STARTED} && exec "$0" "$@"', "nmoe-torchrun"],
        "args": list(arguments),
        "env": [*_environment(job.environment()), *_cache(f"{HOME}/.cache/nmoe")],
        "ports": [{"name": "rendezvous", "containerPort": PORT}],
        "resources": {"limits": {"nvidia.com/gpu": str(job.gpus())}} if job.gpus() else {},
        "startupProbe": _probe(f'[ "$0" -nt {STARTED} ]', (record,), STARTING_S // PROBE_S),
        "livenessProbe": _probe(age, (record, str(math.ceil(lost_after_s))), PROBES),
    }
    container["volumeMounts"] += [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "config", "mountPath": CONFIG.rpartition("/")[0], "readOnly": True},
    ]
    pod = _pod(container, cluster, end_s=job.end_s())
    pod["subdomain"] = name
    pod["volumes"] += [
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "config", "configMap": {"name": name}},
    ]
    return (
        {**_head("v1", "ConfigMap", name), "data": {CONFIG.rpartition("/")[2]: dump(job.config)}},
        _service(name, PORT, headless=True),
        _indexed_job(name, job.hosts, pod, "train"),
    )


def preparation(run: str, hosts: int, source: str, out: str, cluster: Cluster) -> tuple[Object, ...]:
    """An indexed Job whose pods prepare `source` into `out`, a share each.

    run      name of the run that reads them
    Raises:  InputError for a source outside of the claim.
    """
    if not inside(source):
        raise InputError(
            f"--prepare: expected a path inside the claim, which is mounted as the working folder, got {source!r}; "
            "write a relative one without '..'"
        )
    container: Object = {
        **_container("prep", cluster),
        "command": ["nmoe", "data", "prep", *map(_literal, (source, out))],
        "args": [f"--worker=$(JOB_COMPLETION_INDEX)/{hosts}"],
        "env": _cache(f"{HOME}/.cache/nmoe"),
    }
    name = f"{label(run)}-prep"
    return (_indexed_job(name, hosts, _pod(container, cluster, end_s=30), "prep"),)


def dashboard(run: str, root: str, cluster: Cluster) -> tuple[Object, ...]:
    """A Deployment of `nmoe viz` that reads the claim, and its Service. Its log has the address with a token.

    run   name of the run that it is started with
    root  folder of run folders
    """
    name = f"{label(run)}-viz"
    arguments = (f"--runs={root}", "--host=0.0.0.0", f"--port={VIZ_PORT}")
    container: Object = {
        **_container("viz", cluster, read_only=True),
        "command": ["nmoe", "viz"],
        "args": [_literal(argument) for argument in arguments],
        "env": _cache("/tmp/nmoe"),
        "ports": [{"name": "http", "containerPort": VIZ_PORT}],
        "readinessProbe": {"tcpSocket": {"port": VIZ_PORT}, "periodSeconds": PROBE_S},
    }
    labels = {"app.kubernetes.io/name": name}
    deployment: Object = {
        **_head("apps/v1", "Deployment", name),
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {**_pod(container, cluster, end_s=30), "restartPolicy": "Always"},
            },
        },
    }
    return (deployment, _service(name, VIZ_PORT, headless=False))


def listed(objects: tuple[Object, ...]) -> Object:
    """One object that holds them all."""
    return {"apiVersion": "v1", "kind": "List", "items": list(objects)}


def _head(version: str, kind: str, name: str) -> Object:
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": name}}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _indexed_job(name: str, hosts: int, pod: Object, container: str) -> Object:
    """A Job of a pod a host. Exit code 75 and a drained host cost none of its failures; bad input ends it at once."""
    on_exit: Object = {"containerName": container, "operator": "In"}
    rules: list[Object] = [
        {"action": "Ignore", "onExitCodes": {**on_exit, "values": [EXIT_AGAIN]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {**on_exit, "values": list(EXITS_FOR_GOOD)}},
    ]
    spec: Object = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": FAILURES * hosts,
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": {"app.kubernetes.io/name": name}}, "spec": pod},
    }
    return {**_head("batch/v1", "Job", name), "spec": spec}


def _service(name: str, port: int, *, headless: bool) -> Object:
    # A rank looks the first host up before any pod is ready.
    kind = {"clusterIP": "None", "publishNotReadyAddresses": True} if headless else {}
    ports = [{"name": "rendezvous" if headless else "http", "port": port}]
    return {
        **_head("v1", "Service", name),
        "spec": {**kind, "selector": {"app.kubernetes.io/name": name}, "ports": ports},
    }


def _pod(container: Object, cluster: Cluster, *, end_s: int) -> Object:
    volumes: list[Object] = [{"name": "work", "persistentVolumeClaim": {"claimName": cluster.claim}}]
    if cluster.data_claim is not None:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": cluster.data_claim}})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": end_s,
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER},
        "containers": [container],
        "volumes": volumes,
    }


def _container(name: str, cluster: Cluster, *, read_only: bool = False) -> Object:
    mounts: list[Object] = [{"name": "work", "mountPath": HOME, "readOnly": read_only}]
    if cluster.data_claim is not None:
        mounts.append({"name": "data", "mountPath": f"{HOME}/data", "readOnly": read_only})
    return {
        "name": name,
        "image": cluster.image,
        "workingDir": HOME,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }


def _probe(test: str, arguments: tuple[str, ...], failures: int) -> Object:
    """A probe by a shell whose `$0` and `$1` are the arguments, so that no text of a user is a program."""
    return {
        "exec": {"command": ["sh", "-c", test, *arguments]},
        "periodSeconds": PROBE_S,
        "timeoutSeconds": PROBE_S,
        "failureThreshold": failures,
    }


def _environment(variables: dict[str, str]) -> list[Object]:
    return [{"name": name, "value": value} for name, value in variables.items()]


def _cache(folder: str) -> list[Object]:
    return _environment({"NMOE_HOME": folder, "HOME": "/tmp"})


def _literal(argument: str) -> str:
    """An argument in which Kubernetes replaces no $(NAME)."""
    return argument.replace("$", "$$")
