"""`nmoe launch`: print a job that trains a config on several hosts. Nothing is submitted."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nmoe.cli.parser import Parser, Verbs, add, group, load
from nmoe.errors import InputError

if TYPE_CHECKING:
    from nmoe.config import Config
    from nmoe.pure.cluster.job import Job


def verbs(root: Verbs) -> None:
    """Text for schedulers."""
    launch = group(root, "launch", "print a job for a scheduler that trains a config on several hosts")
    slurm = add(
        launch,
        "slurm",
        _slurm,
        "print a script for sbatch",
        "moonlight --hosts 1 --run.name=first > job.sh",
        config=True,
    )
    kubernetes = add(
        launch,
        "kubernetes",
        _kubernetes,
        "print objects for kubectl apply",
        "moonlight --hosts 1 --image nmoe:gpu --claim work --run.name=first > job.json",
        config=True,
    )
    for parser in (slurm, kubernetes):
        _add_hosts(parser)
    kubernetes.add_argument("--image", required=True, help="image that has nmoe, such as one of docker/")
    kubernetes.add_argument(
        "--claim", required=True, metavar="NAME", help="PersistentVolumeClaim that all hosts mount as working folder"
    )
    kubernetes.add_argument("--data-claim", metavar="NAME", help="another one for the folder data in it")
    kubernetes.add_argument("--viz", action="store_true", help="add a deployment of `nmoe viz`")


def _add_hosts(parser: Parser) -> None:
    parser.add_argument("--hosts", type=int, required=True, metavar="N", help="hosts, all with as many GPUs")
    parser.add_argument("--gpus-per-host", type=int, default=8, metavar="N", help="GPUs of a host (default: 8)")
    parser.add_argument(
        "--prepare",
        metavar="SOURCE",
        help="print, instead of the training, the job whose hosts share the work of `nmoe data prep SOURCE` into the "
        "config's data.source.path",
    )


def _slurm(args: argparse.Namespace) -> int:
    from nmoe.pure.cluster import slurm

    loaded = load(args, to_run=args.prepare is None)
    if args.prepare is None:
        # What is set here has to hold there: the hosts of the job may have another environment.
        names = [place.removeprefix("environment ") for place in loaded.sources.values()]
        job = _job(loaded.config, args, {name: os.environ[name] for name in names if name in os.environ})
        text = slurm.training(job, _as_written(args.config), tuple(args.overrides))
    else:
        text = slurm.preparation(_name(loaded.config, args), args.hosts, args.prepare, _prepared(loaded.config))
    print(text, end="")
    return 0


def _kubernetes(args: argparse.Namespace) -> int:
    from nmoe.effects.record.alive import lost_after_s
    from nmoe.pure.cluster import kubernetes

    config = load(args, to_run=args.prepare is None).config
    claims = kubernetes.Cluster(image=args.image, claim=args.claim, data_claim=args.data_claim)
    cluster = kubernetes.plan_cluster(config, claims)
    name = _name(config, args)
    if args.prepare is None:
        objects = kubernetes.training(_job(config, args, {}), cluster, lost_after_s(config.log.heartbeat_every_s))
    else:
        objects = kubernetes.preparation(name, args.hosts, args.prepare, _prepared(config), cluster)
    if args.viz:
        objects = (*objects, *kubernetes.dashboard(name, config.run.root, cluster))
    print(json.dumps(kubernetes.listed(objects), indent=2))
    return 0


def _job(config: Config, args: argparse.Namespace, variables: Mapping[str, str]) -> Job:
    from nmoe.effects.parallel.launch import MULTICAST_OFF
    from nmoe.pure.cluster.job import plan_job

    switches = MULTICAST_OFF if config.run.device == "cuda" else {}
    return plan_job(config, args.hosts, args.gpus_per_host, {**switches, **variables})


def _name(config: Config, args: argparse.Namespace) -> str:
    """What the objects of a job are called after.

    Raises:  InputError for a number of hosts that is none.
    """
    from nmoe.config.run_name import label

    if args.hosts < 1:
        raise InputError(f"--hosts: expected at least 1, got {args.hosts}; raise it")
    return config.run.name or label(args.config.stem)


def _prepared(config: Config) -> str:
    """The folder that data is prepared into.

    Raises:  InputError for a config that names none.
    """
    from nmoe.config import Shards

    source = config.data.source
    if not isinstance(source, Shards):
        raise InputError(
            f'data.source.kind: expected "shards" with --prepare, got "{source.kind}"; prepare each folder by '
            "`nmoe data prep`"
        )
    return source.path


def _as_written(config: Path) -> str:
    """CONFIG for another host: a preset by its name, for its path is one of this host; else the path."""
    from nmoe.config import preset

    return config.stem if config.stem in preset.names() and preset.path_of(config.stem) == config else str(config)
