"""Every command that a page prints in a block is typed here, or by a test named here, or can not be on a CPU alone.

Commands in running text are parsed: their verbs, options and keys are there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nmoe.cli import OVERRIDE, build_parser, main
from nmoe.cli.parser import under
from nmoe.config import load_valid, preset
from nmoe.config.fields import every_key, kinds
from nmoe.config.sections import Config
from nmoe.effects.data import stdlib
from tests.effects.train import trainings

ROOT = Path(__file__).parent.parent
WITHOUT = ("cli.md", "log.md", "CHANGELOG.md")
"""Pages that give no commands to type: the generated usage of each verb, and what was done once."""
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if path.name not in WITHOUT)

SMALL = (
    *("--data.source.kind=shards", "--data.source.path=shards/mine", "--train.steps=2", "--train.batch_size=2"),
    *("--train.microbatch_size=2", "--validation.tokens=256"),
)
FEW = ("--limit", "2", "--device", "cpu")

HERE: dict[str, tuple[str, ...]] = {
    "nmoe runs list": (),
    "nmoe runs show NAME": (),
    "nmoe runs show first": (),
    'nmoe generate runs/NAME --prompt "def "': ("--tokens", "2"),
    'nmoe generate first --prompt "def "': ("--tokens", "2"),
    'nmoe generate first --prompt "def " --prompt "class " --tokens 64 --temperature 0 --stop "\\n\\n"': (
        *("--tokens", "2"),
    ),
    "nmoe run quickstart --train.steps=200 --model.moe.top_k=4": (*SMALL, "--run.name=other"),
    "nmoe config show quickstart --sources": (),
    "nmoe run quickstart --precision.compute=nvfp4 --precision.emulate=true --model.moe.intermediate_size=128": (
        *(*SMALL, "--run.name=emulated", "--model.hidden_size=128"),
    ),
    "nmoe run quickstart --run.name=first --checkpoint.every=50": (*SMALL, "--run.name=named"),
    "nmoe plan moonlight --gpus 8": (),
    "nmoe plan dsv3 --gpus 256 --hosts 32": (),
    "nmoe eval runs/first": ("--suite", "probes", *FEW),
    "nmoe eval RUN": ("--suite", "probes", *FEW),
    "nmoe eval runs/first --suite bits --limit 50": FEW,
    "nmoe data tokenizer train configs/sources/stdlib.toml --size 4096": ("--size", "300"),
    "nmoe data prep configs/sources/stdlib.toml shards/stdlib": ("--workers", "1"),
    "nmoe data verify shards/stdlib": (),
    "nmoe data head shards/stdlib --split validation": (),
    "nmoe data prep configs/mixtures/local.toml --dry-run": (),
    "nmoe data prep configs/mixtures/local.toml": ("--workers", "1"),
}
"""What is typed in a small workplace, with what makes it short."""

QUICK = "tests/test_install.py::test_an_installed_wheel_trains"
LAUNCH = "tests/test_launch.py::test_the_commands_of_the_page_work"
TUTORIAL = "tests/effects/data/test_own_data.py::test_the_tutorial_trains_on_a_folder_of_mixed_files"
FOLDERS = "tests/effects/checkpoint/test_hf.py::test_export_import_export_gives_equal_bytes"
HARNESS = "tests/effects/evals/test_harness.py::test_every_kind_of_task_is_scored_and_kept"
SHELLS = "tests/test_completion.py::test_the_script_of_each_shell_is_printed"

ELSEWHERE = {
    "nmoe run quickstart": QUICK,
    "nmoe run quickstart --run.name=first": QUICK,
    "nmoe bench records docs/records/cpu-study.toml out --jobs 2": "tests/bench/test_records.py",
    "nmoe doctor": "tests/effects/device/test_doctor.py::test_this_machine",
    "nmoe viz": "tests/test_install.py::test_an_installed_wheel_loads_every_file",
    "nmoe viz --runs runs --data data/prepared": "tests/effects/runs/test_viz.py",
    "nmoe data prep FOLDER OUT": TUTORIAL,
    "nmoe data prep texts data/mine --vocab 1024": TUTORIAL,
    "nmoe run quickstart --data.source.kind=shards --data.source.path=data/mine --model.vocab_size=1024 "
    "--run.name=mine": TUTORIAL,
    'nmoe generate runs/mine --prompt "The "': TUTORIAL,
    "nmoe export hf RUN OUT": FOLDERS,
    "nmoe import hf FOLDER OUT": FOLDERS,
    "nmoe export hf runs/first out": FOLDERS,
    "nmoe import hf out imported": FOLDERS,
    "nmoe run quickstart --gpus 2 --fit --profile trace.json": "tests/effects/train/"
    "test_profile.py::test_two_ranks_are_profiled_and_the_slowest_is_named",
    "nmoe eval runs/first --lm-eval my_task --tasks folder/of/yaml": HARNESS,
    "nmoe run CONFIG --gpus 2": "tests/effects/parallel/test_launch.py::test_a_dead_rank_ends_all_and_a_signal_to_the_"
    "launcher_saves_on_all",
    "nmoe launch slurm moonlight --hosts 4 --parallel.ranks=32 --parallel.experts=8 --train.microbatch_size=2 "
    "--run.name=first": LAUNCH,
    "nmoe launch slurm moonlight --hosts 4 --prepare sources/web.toml": LAUNCH,
    "nmoe launch kubernetes moonlight --hosts 4 --parallel.ranks=32 --parallel.experts=8 --train.microbatch_size=2 "
    "--run.name=first --image registry.example/nmoe:gpu --claim work --viz": LAUNCH,
    "nmoe launch kubernetes moonlight --hosts 16 --prepare sources/web.toml --image registry.example/nmoe:cpu --claim "
    "work": LAUNCH,
    'eval "$(nmoe completion bash)"': "tests/test_completion.py::test_the_tab_key_of_bash_completes_a_whole_command",
    'eval "$(nmoe completion zsh)"': SHELLS,
    "nmoe completion fish | source": SHELLS,
}

GPU, CLUSTER, SUITE = "needs a GPU", "needs a cluster", "is what runs the tests"
SETUP, IMAGE = "installs packages; tests/test_install.py installs the wheel", "needs Docker; tests/test_docker.py"

NOT_RUN = {
    "nmoe run moonlet": GPU,
    "nmoe run moonlet --run.name=first": GPU,
    "nmoe run moonlight --gpus 8": GPU,
    "nmoe bench moe": GPU,
    "pip install --no-deps sonic-moe==0.1.2.post1 quack-kernels==0.3.11 nvidia-cutlass-dsl==4.4.2 "
    "nvidia-cutlass-dsl-libs-base==4.4.2": SETUP,
    "pip install --no-deps apache-tvm-ffi torch-c-dlpack-ext einops": SETUP,
    "nmoe run CONFIG --run.device=cuda --run.kernels=torch": GPU,
    "torchrun --nproc_per_node=8 -m nmoe run moonlight --run.name=first": GPU,
    "make gpu-test": GPU,
    "sbatch --partition=gpu --time=24:00:00 job.sh": CLUSTER,
    "kubectl apply --filename job.json": CLUSTER,
    "docker build --file docker/gpu.Dockerfile --tag registry.example/nmoe:gpu .": IMAGE,
    "make run": SETUP,
    "pip install --constraint constraints.txt torch==2.13.0 '.[data]'": SETUP,
    "pip install --constraint constraints-gpu.txt torch==2.11.0 '.[data,telemetry]'": SETUP,
    "pip install '.[viz]'": SETUP,
    "pip install '.[eval]'": SETUP,
    "nmoe eval runs/first --lm-eval hellaswag arc_easy --limit 500": "downloads its tasks' data",
    "make test": SUITE,
    "make test-kernels": SUITE,
    "make test-long": SUITE,
    "make check": SUITE,
    "python -m pytest tests/PATH/test_FILE.py -k NAME": SUITE,
    "python -m pytest tests/test_architecture.py tests/test_unused.py tests/test_imports.py tests/test_docs.py "
    "tests/test_mutations.py": SUITE,
}

PROGRAMS = ("nmoe", "make", "pip", "python", "torchrun", "sbatch", "kubectl", "docker", "eval")
TAKES = {"NAME": "first", "RUN": "first"}


def plain(line: str) -> str:
    """A command without comment, redirection and folder of the environment."""
    line = re.sub(r"\s+(#|> ).*", "", line.strip().removeprefix(".venv/bin/"))
    return " ".join(line.split())


def commands(page: Path) -> Iterator[str]:
    """The commands of the blocks of a page that have no language."""
    for language, block in re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if language:
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.removeprefix(".venv/bin/").split(" ")[0] in PROGRAMS and (command := plain(line)):
                yield command


def test_every_command_is_run_somewhere_or_says_why_not() -> None:
    """Each in one table, none in a table that no page has."""
    tables = (HERE, ELSEWHERE, NOT_RUN)
    assert sorted(dict.fromkeys(command for page in PAGES for command in commands(page))) == sorted(
        command for table in tables for command in table
    )
    for test in ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text(), test


@pytest.fixture(scope="module")
def workplace(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a run of them, and the configs of the repository over a small corpus."""
    place = tmp_path_factory.mktemp("docs")
    assert trainings.train(trainings.config(place, "first", sources, 2))[0] == 0
    (place / "shards").mkdir()
    (place / "shards" / "mine").symlink_to(sources)
    for name in ("sources", "mixtures"):
        (place / "configs" / name).mkdir(parents=True)
    text = (ROOT / "configs" / "mixtures" / "local.toml").read_text()
    (place / "configs" / "mixtures" / "local.toml").write_text(text)
    for name in ("stdlib", "debian", "packages"):
        source = (ROOT / "configs" / "sources" / f"{name}.toml").read_text()
        files = f'kind = "files"\npaths = ["{ROOT}/nmoe/pure/{"cost" if name == "debian" else "core"}"]\n'
        source = re.sub(r"kind = .*\n(paths = .*\n)?(exclude = .*\n)?", files, source, count=1)
        (place / "configs" / "sources" / f"{name}.toml").write_text(f"{source}\n[splits]\nvalidation = 0.2\n")
    return place


@pytest.mark.parametrize(
    "page", [page for page in PAGES if HERE.keys() & set(commands(page))], ids=lambda page: page.name
)
def test_the_commands_of_a_page_work(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order: one may need what another has written."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("NMOE_HOME", str(workplace / "home"))
    monkeypatch.setattr(stdlib, "held_out", lambda: ['def f(x):\n    """Double."""\n    return 2 * x\n'])
    for command in commands(page):
        if command in HERE:
            words = [TAKES.get(word, word.replace("runs/NAME", "runs/first")) for word in shlex.split(command)[1:]]
            code = main([*words, *HERE[command]])
            assert code == 0, (command, capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_trainings_of_presets_have_valid_configs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too that are run elsewhere in another form, or nowhere: the settings on the page fit together."""
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        words = shlex.split(command)[1:] if command.startswith("nmoe run ") else ["CONFIG"]
        if words[1:2] and (words[1] in preset.names() or (ROOT / words[1]).is_file()):
            ranks = words[words.index("--gpus") + 1] if "--gpus" in words else None
            overrides = [word for word in words if OVERRIDE.fullmatch(word)]
            overrides += [f"--parallel.ranks={ranks}"] if ranks else []
            path = preset.path_of(words[1]) if words[1] in preset.names() else ROOT / words[1]
            load_valid(path, {}, overrides, fit="--fit" in words)


def overridable() -> set[str]:
    """Every key that an override may set."""
    names = {".".join(path) for path, _ in every_key(Config)}
    return names | {f"{'.'.join(path)}.kind" for path, key in every_key(Config) if kinds(key.type)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_running_text_name_what_is_there(page: Path) -> None:
    """Verbs, options and keys of `nmoe ...`, and targets of `make ...`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    parser, _ = build_parser()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong: list[str] = []
    for command in re.findall(r"`((?:nmoe|make) [a-z][^`]*)`", text):
        words = command.split()
        if words[0] == "make":
            wrong += [] if words[1] in targets else [command]
            continue
        leaf, rest = parser, words[1:]
        while rest and rest[0] in (verbs := under(leaf)):
            leaf, rest = verbs[rest[0]], rest[1:]
        options = set(leaf._option_string_actions)  # pyright: ignore[reportPrivateUsage]
        for word in rest:
            override = OVERRIDE.fullmatch(word)
            if override is not None and override[1] not in overridable():
                wrong.append(f"{command}: {word}")
            if override is None and word.startswith("--") and word.partition("=")[0] not in options:
                wrong.append(f"{command}: {word}")
        if leaf is parser or (under(leaf) and rest and not rest[0].startswith("-")):
            wrong.append(command)
    assert wrong == []
