"""`nmoe data prep MIXTURE`: each source of a data mixture into its folder, and the command that trains on them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from nmoe.config import load, preset
from nmoe.config.data_mixture import DataMixture
from nmoe.config.data_source import Source, load_source
from nmoe.config.run_name import label
from nmoe.effects import files
from nmoe.effects.data.mixture import plan_mixture
from nmoe.effects.data.prepare.folder import PRESET, dry_run_lines, large_documents
from nmoe.effects.data.prepare.inputs import one_line
from nmoe.effects.data.prepare.prep import begun
from nmoe.effects.data.store.format import MANIFEST, read_manifest
from nmoe.effects.data.tokenizer import Tokenizer
from nmoe.effects.data.tokenizers import resolve
from nmoe.errors import InputError
from nmoe.pure.model.blueprint import make_blueprint


@attrs.frozen(kw_only=True)
class Job:
    """One source of a mixture that is prepared.

    base  folder that the source's relative paths start from
    """

    name: str
    source: Source
    base: Path
    out: Path
    tokenizer: Tokenizer


def jobs(mixture: DataMixture, home: Path) -> tuple[Job, ...]:
    """What is prepared, in the order of the mixture, checked before anything is read or written.

    Raises:  InputError when a source TOML is wrong, a folder is neither prepared nor named one, holds something else,
             or two sources have different tokenizers.
    """
    found: list[Job] = []
    problems: list[str] = []
    identities: dict[str, str] = {}
    for name, part in mixture.parts.items():
        out = (mixture.path.parent / files.expanded(part.path)).resolve()
        try:
            if part.prepare is not None:
                path = mixture.path.parent / files.expanded(part.prepare)
                source = load_source(path)
                known = resolve(source.tokenizer, home, path.parent)
                begun(out)
                found.append(Job(name=name, source=source, base=path.parent.resolve(), out=out, tokenizer=known))
                identities[name] = known.identity
            elif (out / MANIFEST).exists():
                identities[name] = read_manifest(out).tokenizer_identity
            else:
                problems.append(
                    f"{mixture.path}: sources.{name}: expected a prepared folder {part.path}, or its source, got "
                    'neither; write prepare = "SOURCE.toml"'
                )
        except InputError as error:
            problems += (f"sources.{name}: {problem}" for problem in error.problems)
    first = next(iter(identities.items()), ("", ""))
    problems += [
        f"{mixture.path}: sources.{name}: expected the tokenizer of {first[0]}, {first[1][:12]}, got {identity[:12]}; "
        "use one tokenizer for all"
        for name, identity in identities.items()
        if identity != first[1]
    ]
    if problems:
        raise InputError(*problems)
    return tuple(found)


def plan_lines(every: Sequence[Job], say: Callable[[str], None]) -> list[str]:
    """What preparation would read and write, source by source."""
    return [
        line
        for job in every
        for line in (
            f"source      {job.name}",
            *dry_run_lines(job.source, job.base, job.out, f"{job.tokenizer.name}, {job.tokenizer.size} tokens", say),
        )
    ]


def next_lines(mixture: DataMixture, every: Sequence[Job]) -> list[str]:
    """What to do next with a prepared mixture: documents to look at, then the command that trains on its first flow."""
    folders = [mixture.path.parent / files.expanded(part.path) for part in mixture.parts.values()]
    large = [line for job in every for line in large_documents(job.out, str(job.out), read_manifest(job.out))]
    flow = next(field.name for field in attrs.fields(type(mixture.flows)) if getattr(mixture.flows, field.name))
    vocab = f"--model.vocab_size={read_manifest(folders[0]).tokenizer_size}"
    config = load(preset.path_of(PRESET), {}, (vocab,)).config
    try:
        active = make_blueprint(config).parameters.active
        length = config.train.sequence_length
        stream = plan_mixture(mixture, flow, sequence_length=length, active_parameters=active).stream
    except InputError as error:
        return [*large, f"next       {PRESET} can not train on flow {flow}: {one_line(error)}"]
    steps = stream.windows() // config.train.batch_size
    words = (
        *("nmoe", "run", PRESET, "--data.source.kind=mixture", f"--data.source.path={mixture.path}"),
        *(f"--data.source.flow={flow}", vocab),
        *((f"--train.steps={steps}",) if steps < config.train.steps else ()),
        f"--run.name={label(mixture.path.stem)}",
    )
    return [*large, "next       train on it with:", shlex.join(words)]
