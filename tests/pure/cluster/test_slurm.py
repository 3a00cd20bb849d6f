"""Scripts for sbatch: what bash makes of them, with srun, scontrol and the launcher replaced by recorders."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.errors import InputError
from nmoe.pure.cluster import slurm
from tests.pure.cluster.jobs import TEXTS, job

RECORDER = f"""#!{sys.executable} -ES
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    keys = ("A", "MASTER_ADDR", "MASTER_PORT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    call = sys.argv[0].rpartition("/")[2], sys.argv[1:], {{key: os.environ.get(key) for key in keys}}
    file.write(json.dumps(call) + "\\n")
sys.exit(int(os.environ["CODE"]))
"""
SRUN = '#!/bin/bash\nwhile [ "${1#--}" != "$1" ]; do shift; done\nSLURM_NODEID=1 SLURM_PROCID=1 exec "$@"\n'
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else CODE=0 exec scontrol-recorder "$@"; fi
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    texts = {"srun": SRUN, "scontrol": SCONTROL}
    texts |= dict.fromkeys(("scontrol-recorder", "nmoe-torchrun", "nmoe"), RECORDER)
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def ran(script: str, programs: Path, folder: Path, code: int = 0) -> tuple[int, list[list[object]]]:
    """Exit code of a script, and the calls that the recorders saw."""
    environ = {
        **{"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(folder / "record"), "CODE": str(code)},
        **{"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "x[1-2]", "SLURM_CPUS_ON_NODE": "4"},
    }
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def directives(script: str) -> dict[str, str]:
    """The options as sbatch reads them: at the head, up to the first command."""
    options: dict[str, str] = {}
    first, *lines = script.splitlines()
    assert first == "#!/bin/bash"
    for line in lines:
        if not line.startswith("#"):
            break
        (option,) = shlex.split(line.removeprefix("#SBATCH "))
        name, _, value = option.partition("=")
        options[name] = value
    assert script.count("#SBATCH") == len(options)
    return options


def test_directives_are_those_of_the_job() -> None:
    options = directives(slurm.training(job(hosts=4, grace_s=100.5), "moonlight", ()))
    assert options["--nodes"] == "4" and options["--gpus-per-node"] == "8" and options["--ntasks-per-node"] == "1"
    assert options["--signal"] == "TERM@116" and "--requeue" in options and options["--job-name"] == "nmoe-first"


def test_a_cpu_asks_for_no_gpus() -> None:
    assert "--gpus-per-node" not in directives(slurm.training(job(device="cpu"), "quickstart", ()))


@settings(max_examples=25, deadline=None)
@given(config=TEXTS, override=TEXTS, hosts=st.integers(1, 9), per_host=st.integers(1, 9))
def test_any_text_of_a_user_reaches_the_run_as_it_is(
    programs: Path, config: str, override: str, hosts: int, per_host: int
) -> None:
    script = slurm.training(job(hosts, per_host), config, (override,))
    assert int(directives(script)["--nodes"]) * int(directives(script)["--gpus-per-node"]) == hosts * per_host
    with tempfile.TemporaryDirectory() as folder:
        code, ((name, arguments, environ),) = ran(script, programs, Path(folder))
    assert (code, name) == (0, "nmoe-torchrun")
    assert arguments == [
        *("--node-rank=1", "--master-addr=first", "--master-port=22345"),
        *(f"--nnodes={hosts}", f"--nproc-per-node={per_host}", "-m", "nmoe", "run", config, override),
    ]
    assert environ == {
        **{"A": "b 'c' \"d\" $E", "MASTER_ADDR": "first", "MASTER_PORT": "22345"},
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "40",
    }


@pytest.mark.parametrize("code", [0, 1, 2, 6, 75, 143])
def test_exit_code_75_requeues_and_no_other(programs: Path, tmp_path: Path, code: int) -> None:
    ended, calls = ran(slurm.training(job(), "moonlight", ()), programs, tmp_path, code)
    assert ended == code
    assert [call[1] for call in calls[1:]] == ([["requeue", "12345"]] if code == 75 else [])


@pytest.mark.parametrize("root", ["runs", "my 'runs' $HOME/of \"mine\"", "-x"])
def test_the_log_ends_in_the_run_folder(programs: Path, tmp_path: Path, root: str) -> None:
    script = slurm.training(job(root=root), "moonlight", ())
    ran(script, programs, tmp_path)
    # the run made no folder: nothing else may, for nmoe takes a folder without config.toml for somebody else's
    assert [path.name for path in (tmp_path / root).iterdir()] == ["first.slurm-12345.0.log"]
    (tmp_path / root / "first").mkdir()
    ran(script, programs, tmp_path)
    assert [path.name for path in (tmp_path / root / "first").iterdir()] == ["first.slurm-12345.0.log"]


def test_a_grace_time_beyond_slurm_is_refused() -> None:
    with pytest.raises(InputError, match="^checkpoint.grace_s: expected at most 65520 s on Slurm, got 65521; lower it"):
        slurm.training(job(grace_s=65521.0), "moonlight", ())
    assert directives(slurm.training(job(grace_s=65520.0), "moonlight", ()))["--signal"] == "TERM@65535"


@settings(max_examples=10, deadline=None)
@given(source=TEXTS, out=TEXTS)
def test_data_is_prepared_by_all_hosts(programs: Path, source: str, out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, ((name, arguments, _),) = ran(slurm.preparation("first", 3, source, out), programs, Path(folder))
    assert name == "nmoe" and arguments == ["data", "prep", source, out, "--worker=1/3", "--workers=4"]
