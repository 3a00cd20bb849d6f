"""`nmoe doctor`: check that this machine can run nmoe, and advise where it cannot.

`gather` collects the facts, `judge` is a function of them.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import attrs

from nmoe.config import load, preset
from nmoe.config.check import remarks
from nmoe.config.data_mixture import load_mixture
from nmoe.config.sections import Mixture, Shards, Stdlib
from nmoe.effects import files
from nmoe.effects.parallel.launch import ALLOCATOR, MULTICAST_OFF
from nmoe.effects.terminal import say, say_json, table
from nmoe.errors import InputError, pip_install
from nmoe.pure.units import quantity

MINIMUM = MappingProxyType({"python": (3, 11), "torch": (2, 11), "triton": (3, 6)})
"""Oldest version of each that nmoe works with."""

TESTED = MappingProxyType({"2.13.0": "3.7.1", "2.11.0": "3.6.0"})
"""Triton by the torch it was tested with: the pins of constraints.txt and constraints-gpu.txt."""

REQUIREMENT = re.compile(r"([\w.-]+).*extra == [\"']([\w-]+)")
"""A package of an extra, as metadata has it: `name>=1.0; extra == "viz"`."""

LITTLE_MEMORY, LITTLE_DISK = 4 * 10**9, 4 * 10**9  # bytes


@attrs.frozen(kw_only=True)
class Gpu:
    """One GPU that torch sees."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@attrs.frozen(kw_only=True)
class Preset:
    """What a preset asks of a machine."""

    name: str
    problems: tuple[str, ...] = ()  # why it cannot be read; the rest is then unset
    device: str = ""
    ranks: int = 1
    data: str | None = None  # folder of prepared shards; None: the standard library as corpus
    data_found: bool = True
    remarks: tuple[str, ...] = ()  # what is right and slow


@attrs.frozen(kw_only=True)
class Facts:
    """A machine, as far as nmoe cares."""

    python: str
    system: str
    packages: Mapping[str, str]  # version of each installed package
    extras: Mapping[str, tuple[str, ...]]  # packages of each optional extra; none when nmoe is not installed
    broken: Mapping[str, str]  # what happened when torch or triton was imported
    cpus: int
    memory_bytes: int
    free_bytes: int  # on the disk of the working folder
    gpus: tuple[Gpu, ...]
    supported: tuple[tuple[int, int], ...]  # compute capabilities
    peers: bool  # each GPU reads and writes the memory of each other
    environ: Mapping[str, str]
    runs_problem: str | None  # why a run folder cannot be written
    presets: tuple[Preset, ...]


@attrs.frozen(kw_only=True)
class Line:
    """One finding."""

    level: Literal["ok", "none", "warn", "FAIL"]
    what: str
    value: str
    advice: str = ""


def main(as_json: bool) -> int:
    """Print a line for each thing nmoe needs.

    returns  exit code: 0, or 1 when something fails
    """
    lines = judge(gather())
    if as_json:
        say_json([attrs.asdict(line) for line in lines])
    else:
        rows = [(line.level, line.what, f"{line.value} -> {line.advice}".removesuffix(" -> ")) for line in lines]
        say(table(("level", "checked", "result"), rows, left=3))
    return int(any(line.level == "FAIL" for line in lines))


def judge(facts: Facts) -> tuple[Line, ...]:
    """What the facts mean.

    `none` is something optional that is not there, `warn` something to look at, `FAIL` something nothing works without.
    """
    return (
        *_software(facts),
        *_machine(facts),
        *_gpus(facts),
        *(line for preset in facts.presets for line in _preset(preset, facts)),
    )


def _software(facts: Facts) -> Iterator[Line]:
    yield _version("python", facts.python, f"use Python {_dotted(MINIMUM['python'])} or newer")
    for package in ("torch", "triton"):
        if package == "triton" and facts.system != "Linux":
            yield Line(level="ok", what=package, value=f"not needed on {facts.system}")
        elif package not in facts.packages:
            yield Line(level="FAIL", what=package, value="absent", advice=f"pip install {package}")
        elif package in facts.broken:
            broken = f"{facts.packages[package]} cannot be imported: {facts.broken[package]}"
            yield Line(level="FAIL", what=package, value=broken, advice=f"pip install --force-reinstall {package}")
        else:
            advice = f"pip install --upgrade '{package}>={_dotted(MINIMUM[package])}'"
            yield _version(package, facts.packages[package], advice)
    if {"torch", "triton"} <= facts.packages.keys():
        yield _pair(facts.packages["torch"].partition("+")[0], facts.packages["triton"])
    if not facts.extras:
        value = "unknown, nmoe runs from a checkout that is not installed"
        yield Line(level="warn", what="extras", value=value, advice="pip install -e .")
    for extra, packages in facts.extras.items():
        value = ", ".join(f"{package} {facts.packages.get(package, 'absent')}" for package in packages)
        if all(package in facts.packages for package in packages):
            yield Line(level="ok", what=f"extra {extra}", value=value)
        else:
            yield Line(level="none", what=f"extra {extra}", value=value, advice=pip_install(extra))


def _machine(facts: Facts) -> Iterator[Line]:
    little = facts.memory_bytes < LITTLE_MEMORY
    yield Line(
        level="warn" if little else "ok",
        what="cpu and memory",
        value=f"{facts.cpus} cores, {quantity(facts.memory_bytes, 'B')}",
        advice=f"have {quantity(LITTLE_MEMORY, 'B')}, or lower train.microbatch_size" if little else "",
    )
    little = facts.free_bytes < LITTLE_DISK
    yield Line(
        level="warn" if little else "ok",
        what="free disk",
        value=quantity(facts.free_bytes, "B"),
        advice=f"free {quantity(LITTLE_DISK, 'B')}, or set run.root to a folder on another disk" if little else "",
    )
    if facts.runs_problem is None:
        yield Line(level="ok", what="folder runs", value="write, fsync and rename work")
    else:
        advice = "fix its permissions, or set run.root to a folder on a local disk"
        yield Line(level="FAIL", what="folder runs", value=facts.runs_problem, advice=advice)


def _gpus(facts: Facts) -> Iterator[Line]:
    if not facts.gpus:
        yield Line(level="ok", what="gpu", value='none that torch can use; configs with run.device = "cpu" run')
    known = " and ".join(map(_dotted, facts.supported))
    for index, gpu in enumerate(facts.gpus):
        good = gpu.capability in facts.supported
        yield Line(
            level="ok" if good else "warn",
            what=f"gpu {index}",
            value=f"{gpu.name}, {quantity(gpu.memory_bytes, 'B')}, compute capability {_dotted(gpu.capability)}",
            advice=""
            if good
            else f"use a GPU of compute capability {known}, "
            + ('run.kernels = "torch" (slower), ' if gpu.capability >= (8, 0) else "")
            + 'or run.device = "cpu"',
        )
    for name in ALLOCATOR if facts.gpus else ():
        if name in facts.environ:
            advice = f"unset {name}, the allocator is set by [memory] of the config"
            yield Line(level="warn", what=name, value=facts.environ[name], advice=advice)
    if len(facts.gpus) > 1:
        yield Line(
            level="ok" if facts.peers else "warn",
            what="gpu to gpu",
            value="each reaches each" if facts.peers else "not each reaches each other's memory",
            advice="" if facts.peers else "use GPUs joined by NVLink; experts cannot be shared out over these",
        )
        for name, value in MULTICAST_OFF.items():
            good = facts.environ.get(name) == value
            yield Line(
                level="ok" if good else "warn",
                what=name,
                value=facts.environ.get(name, "unset"),
                advice="" if good else f"export {name}={value}, NVLink multicast stays off",
            )


def _preset(preset: Preset, facts: Facts) -> Iterator[Line]:
    yield from (Line(level="FAIL", what=preset.name, value=problem) for problem in preset.problems)
    if preset.problems:
        return
    able = sum(gpu.capability in facts.supported for gpu in facts.gpus)
    lacks: list[tuple[str, str]] = []
    if preset.device == "cuda" and able < preset.ranks:
        needed = f"{preset.ranks} GPU{'s' if preset.ranks > 1 else ''}"
        lacks.append((f"meant for {needed}, this machine has {able or 'none'} to use", f"run it on {needed}"))
    if preset.data is None and "tokenizers" not in facts.packages:
        lacks.append(("tokenizers is absent, which the standard library as corpus needs", pip_install("data")))
    if not preset.data_found:
        lacks.append((f"no manifest.json in {preset.data}", "prepare data there, or set data.source.path"))
    if lacks:
        values, advice = zip(*lacks, strict=True)
        yield Line(level="none", what=preset.name, value="; ".join(values), advice="; ".join(advice))
    else:
        yield Line(level="ok", what=preset.name, value="this machine has what it needs")
    yield from (Line(level="ok", what=preset.name, value=remark) for remark in preset.remarks)


def _pair(torch: str, triton: str) -> Line:
    """Whether the versions are a pair that the tests ran with: each torch is built against one triton."""
    value = f"torch {torch} with triton {triton}"
    if TESTED.get(torch) == triton:
        return Line(level="ok", what="torch and triton", value=f"{value}, a pair that is tested")
    if torch in TESTED:
        advice = f"pip install triton=={TESTED[torch]}, which this torch is tested with"
    else:
        tested = " or ".join(f"torch=={a} triton=={b}" for a, b in TESTED.items())
        advice = f"pip install {tested}, or run the tests of the kernels first"
    return Line(level="warn", what="torch and triton", value=f"{value}, a pair that is not tested", advice=advice)


def _version(what: str, installed: str, advice: str) -> Line:
    """A version against the oldest that works."""
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) >= MINIMUM[what]:
        return Line(level="ok", what=what, value=installed)
    return Line(level="FAIL", what=what, value=f"{installed}, older than {_dotted(MINIMUM[what])}", advice=advice)


def _dotted(parts: tuple[int, int]) -> str:
    return ".".join(map(str, parts))


def gather() -> Facts:
    """Look at this machine and the working folder.

    Writes:  a temporary folder in runs/ (beside it where it is not there yet), removed again.
    """
    system = platform.system()
    names = ("torch", *(["triton"] if system == "Linux" else []))
    broken = {name: problem for name in names if (problem := import_problem(name)) is not None}
    gpus, supported, peers = ((), (), True) if "torch" in broken else see_gpus()
    extras = read_extras()
    wanted = ("torch", "triton", *(package for packages in extras.values() for package in packages))
    return Facts(
        python=platform.python_version(),
        system=system,
        packages={package: number for package in wanted if (number := installed(package)) is not None},
        extras=extras,
        broken=broken,
        cpus=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_bytes=shutil.disk_usage(".").free,
        gpus=gpus,
        supported=supported,
        peers=peers,
        environ={name: os.environ[name] for name in (*ALLOCATOR, *MULTICAST_OFF) if name in os.environ},
        runs_problem=probe(Path("runs")),
        presets=tuple(map(read_preset, preset.names())),
    )


def read_extras() -> dict[str, tuple[str, ...]]:
    """Packages of each optional extra by nmoe's own metadata, but those of development; none when it is not "
    "installed."""
    try:
        lines = requires("nmoe") or []
    except PackageNotFoundError:
        return {}
    pairs = [match.groups() for line in lines if (match := REQUIREMENT.match(line))]
    names = dict.fromkeys(extra for _, extra in pairs if extra != "dev")
    return {name: tuple(package for package, extra in pairs if extra == name) for name in names}


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def import_problem(package: str) -> str | None:
    """Why a package cannot be imported; None when it can."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:  # a shared library that is missing raises any of these
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def see_gpus() -> tuple[tuple[Gpu, ...], tuple[tuple[int, int], ...], bool]:
    """GPUs that torch can use, the compute capabilities that nmoe supports, and whether all GPUs reach each other."""
    # Not at the top: doctor has something to say where torch cannot be imported.
    import torch

    from nmoe.pure.cost.machines import PEAK_FLOPS

    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    gpus = tuple(Gpu(name=p.name, memory_bytes=p.total_memory, capability=(p.major, p.minor)) for p in properties)
    peers = all(torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices if a != b)
    return gpus, tuple(PEAK_FLOPS), peers


def probe(folder: Path) -> str | None:
    """Do in `folder`, or the nearest folder above it that exists, what a run does: write, fsync, rename.

    returns  what went wrong; None when all works
    Writes:  a temporary folder, removed again.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".nmoe-doctor-", dir=place) as temporary:
            new, final = Path(temporary) / ".a.new", Path(temporary) / "a"
            new.mkdir()
            files.write_text(new / "config.toml", "written")
            new.rename(final)
            files.sync_folder(final.parent)
            read = (final / "config.toml").read_text(encoding="utf-8")
    except OSError as error:
        return f"{error.strerror} at {error.filename or place}"
    return None if read == "written" else f"expected a renamed file to hold what was written, got {read!r} in {place}"


def read_preset(name: str) -> Preset:
    """What a preset asks for, and whether its data is there."""
    config = load(preset.path_of(name), {}, ()).config
    try:
        folders = _data_folders(config.data.source)
    except InputError as error:
        return Preset(name=name, problems=error.problems)
    missing = [folder for folder in folders if not (folder / "manifest.json").is_file()]
    return Preset(
        name=name,
        device=config.run.device,
        ranks=config.parallel.ranks,
        data=str((missing or folders)[0]) if folders else None,
        data_found=not missing,
        remarks=remarks(config),
    )


def _data_folders(source: Stdlib | Shards | Mixture) -> list[Path]:
    """The folders that a config wants prepared."""
    if isinstance(source, Mixture):
        path = files.expanded(source.path)
        return [
            Path(os.path.normpath(path.parent / files.expanded(part.path)))
            for part in load_mixture(path).parts.values()
        ]
    return [files.expanded(source.path)] if isinstance(source, Shards) else []
