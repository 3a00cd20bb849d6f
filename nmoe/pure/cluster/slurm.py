"""Scripts for sbatch."""

from __future__ import annotations

import shlex

from nmoe.errors import InputError
from nmoe.pure.cluster.job import EXIT_AGAIN, Job, label, torchrun

LONGEST_SIGNAL_S = 65535
"""Seconds before the end of a job that --signal can name."""


def training(job: Job, config: str, overrides: tuple[str, ...]) -> str:
    """The script of a training: it is requeued when the run ends with exit code 75, and resumes.

    config     CONFIG of `nmoe run`, a path from where sbatch is called
    Raises:    InputError for a grace time that Slurm cannot give.
    """
    if job.end_s() > LONGEST_SIGNAL_S:
        raise InputError(
            f"checkpoint.grace_s: expected at most {LONGEST_SIGNAL_S - job.end_s() + job.config.checkpoint.grace_s:g} "
            f"s on Slurm, got {job.config.checkpoint.grace_s:g}; lower it"
        )
    options = (
        *_options(label(job.name), job.hosts),
        *((f"--gpus-per-node={job.gpus()}",) if job.gpus() else ()),
        *("--requeue", f"--signal=TERM@{job.end_s()}"),
    )
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.environment().items()]
    arguments = shlex.join(torchrun(job, config, overrides))
    body = (
        *_log(job.config.run.root, job.name),
        *exports,
        'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"',
        'export MASTER_PORT="$((20000 + SLURM_JOB_ID % 10000))"',
        "# One torchrun a host. When one ends, the others have as long as a run has after a signal.",
        "code=0",
        f'srun --kill-on-bad-exit=0 --wait={job.end_s()} --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c \\',
        '  \'exec nmoe-torchrun --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" '
        f'"$@"\' nmoe-torchrun {arguments} || code=$?',
        '[ ! -d "$run" ] || mv -- "$log" "$run/"',
        f"# {EXIT_AGAIN}: ended by a signal after it was saved; the same job resumes.",
        f'[ "$code" -ne {EXIT_AGAIN} ] || scontrol requeue "$SLURM_JOB_ID"',
        'exit "$code"',
    )
    return _script(options, body)


def preparation(name: str, hosts: int, source: str, out: str) -> str:
    """The script that prepares `source` into `out` on all hosts at once, with a process a core.

    name  of the run that reads them
    """
    arguments = shlex.join(("nmoe", "data", "prep", source, out))
    body = (
        'exec srun --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c \\',
        f'  \'exec "$@" --worker="$SLURM_PROCID/{hosts}" --workers="$SLURM_CPUS_ON_NODE"\' nmoe {arguments}',
    )
    return _script((*_options(f"{label(name)}-prep", hosts), "--requeue"), body)


def _options(name: str, hosts: int) -> tuple[str, ...]:
    return (
        *(f"--job-name={name}", f"--nodes={hosts}", "--ntasks-per-node=1", "--exclusive", "--mem=0"),
        "--open-mode=append",
    )


def _log(root: str, name: str) -> tuple[str, ...]:
    """All output beside the run folder, which no other than the run may make; it is moved there at the end."""
    return (
        f"root={shlex.quote(root)}",
        f'run="$root/"{shlex.quote(name)}',
        'log="$run.slurm-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.log"',
        'mkdir -p -- "$root"',
        'exec >>"$log" 2>&1',
    )


def _script(options: tuple[str, ...], body: tuple[str, ...]) -> str:
    lines = ("#!/bin/bash", *(f"#SBATCH {option}" for option in options), "set -euo pipefail", *body)
    return "".join(f"{line}\n" for line in lines)
