"""Fields of the Kubernetes API that `nmoe launch` may write, for a check that is stricter than the API itself.

A dict is an object with these fields, `*` for any name; a field that ends in `!` is required. A list has members of one
form. Everything else is refused, so that a misspelt field, which an API server would drop, shows.
"""

from __future__ import annotations

from typing import Any

TEXTS = {"*": str}
METADATA = {"name!": str, "labels": TEXTS}
PROBE = {
    "exec": {"command!": [str]},
    "tcpSocket": {"port!": int},
    "periodSeconds": int,
    "timeoutSeconds": int,
    "failureThreshold": int,
}
CONTAINER = {
    "name!": str,
    "image!": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "ports": [{"name": str, "containerPort!": int}],
    "resources": {"limits": TEXTS},
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
    **dict.fromkeys(("startupProbe", "livenessProbe", "readinessProbe"), PROBE),
}
POD = {
    "metadata": {"labels": TEXTS},
    "spec!": {
        "containers!": [CONTAINER],
        "volumes": [
            {
                "name!": str,
                "persistentVolumeClaim": {"claimName!": str},
                "emptyDir": {"medium": str},
                "configMap": {"name!": str},
            }
        ],
        "restartPolicy": str,
        "terminationGracePeriodSeconds": int,
        "automountServiceAccountToken": bool,
        "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int},
        "subdomain": str,
    },
}
RULE = {
    "action!": str,
    "onExitCodes": {"containerName": str, "operator!": str, "values!": [int]},
    "onPodConditions": [{"type!": str, "status": str}],
}
SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("v1", "ConfigMap"): {"data": TEXTS},
    ("v1", "Service"): {
        "spec!": {
            "clusterIP": str,
            "publishNotReadyAddresses": bool,
            "selector": TEXTS,
            "ports": [{"name": str, "port!": int}],
        }
    },
    ("batch/v1", "Job"): {
        "spec!": {
            "completionMode": str,
            "completions": int,
            "parallelism": int,
            "backoffLimit": int,
            "podFailurePolicy": {"rules!": [RULE]},
            "template!": POD,
        }
    },
    ("apps/v1", "Deployment"): {"spec!": {"replicas": int, "selector!": {"matchLabels": TEXTS}, "template!": POD}},
}
"""API version and kind -> fields beside `metadata`."""


def faults(one: dict[str, Any]) -> list[str]:
    """What is no field of an object's kind, has another type, or is missing, with its path."""
    kind = (one.get("apiVersion", ""), one.get("kind", ""))
    if kind not in SPECS:
        return [f"{kind}: not written"]
    return _faults(one, {"apiVersion!": str, "kind!": str, "metadata!": METADATA, **SPECS[kind]}, kind[1])


def _faults(value: Any, form: Any, path: str) -> list[str]:
    if isinstance(form, type):
        return [] if type(value) is form else [f"{path}: not {form.__name__}"]
    if not isinstance(value, type(form)):
        return [f"{path}: not {type(form).__name__}"]
    if isinstance(form, list):
        return [fault for index, member in enumerate(value) for fault in _faults(member, form[0], f"{path}[{index}]")]
    known = {name.removesuffix("!"): inner for name, inner in form.items()}
    missing = [name[:-1] for name in form if name.endswith("!") and name[:-1] not in value]
    return [
        *(f"{path}.{name}: missing" for name in missing),
        *(
            fault
            for name, inner in value.items()
            for fault in (
                _faults(inner, known.get(name, known.get("*")), f"{path}.{name}")
                if name in known or "*" in known
                else [f"{path}.{name}: no such field"]
            )
        ),
    ]
