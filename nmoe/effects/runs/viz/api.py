"""What the server answers, field by field: the one contract that the page is held to as well (`contract`)."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np

Numbers = list[float | None]
"""JSON has no NaN: None stands for it."""


@attrs.frozen(kw_only=True)
class Notes:
    """What people wrote about a run."""

    note: str
    tags: list[str]
    hidden: bool
    is_editable: bool  # the server may write into the run folder
    problem: str | None  # with its file; there is nothing else then


@attrs.frozen(kw_only=True)
class Run:
    """A row of the run table. Times in seconds since 1970; None where the run has not reported."""

    name: str
    status: str
    attempt: int | None
    step: int | None
    steps: int | None
    tokens: float | None
    loss: float | str | None  # a str: nan, inf or -inf
    validation_loss: float | str | None
    best_validation_loss: float | None
    bits_per_byte: float | str | None
    tokens_per_s: float | str | None
    mfu: float | str | None
    started: float | None
    updated: float | None
    elapsed_s: float | None
    left_s: float | None  # to the last step at the speed it has; None unless it is training
    alerts: int
    nonfinite: int
    bad_lines: int
    tags: list[int]  # it has logged, as places in the tags of `Runs`
    notes: Notes
    columns: dict[str, Any]  # the config keys and tags asked for


@attrs.frozen(kw_only=True)
class Column:
    """A column of the run table: a field of `Run`."""

    name: str
    title: str
    format: str  # number, count, bytes, percent, duration or ago
    best: str  # min, max or empty: which value is the best


@attrs.frozen(kw_only=True)
class Metric:
    """What the metrics schema says of a tag."""

    name: str
    unit: str
    kind: str
    doc: str
    format: str  # number, count, bytes or percent
    bad_above: float | None  # a value that is marked is greater
    best: str  # min, max or empty: which value is the best


@attrs.frozen(kw_only=True)
class Runs:
    """Every run, and what may be asked about them."""

    root: str
    runs: list[Run]
    shown: list[Column]
    tags: list[str]  # in the order of the schema
    metrics: list[Metric]  # of the tags, and of the experts
    keys: list[str]  # of configs


@attrs.frozen(kw_only=True)
class Curve:
    """One run in a chart."""

    run: str
    mean: Numbers
    low: Numbers
    high: Numbers
    smooth: Numbers
    last: float | str | None  # newest value of the stretch, not thinned; a str: nan, inf or -inf
    min: float | None  # lowest finite value of the stretch, not thinned
    max: float | None
    nonfinite: list[float]  # places of values that are not finite


@attrs.frozen(kw_only=True)
class Series:
    """One tag of several runs on a common grid."""

    tag: str
    x: list[float]
    curves: list[Curve]
    without: list[str]  # runs that do not have the tag or the axis


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened to a run."""

    run: str
    event: str
    severity: str  # info, warning or error
    attempt: int
    step: int | None
    x: float | None  # place on the axis asked for
    time: float | None
    text: str


@attrs.frozen(kw_only=True)
class Events:
    """What happened, newest first."""

    events: list[Event]
    left_out: int


@attrs.frozen(kw_only=True)
class SavedState:
    """A checkpoint of a run."""

    name: str
    step: int
    attempt: int
    time: float | None
    validation_loss: float | None  # of the last validation up to its step
    size_bytes: int | None
    seconds: float | None  # that writing it took
    command: str  # that resumes from it


@attrs.frozen(kw_only=True)
class Checkpoints:
    """The checkpoints that a run's folder holds, newest first."""

    run: str
    checkpoints: list[SavedState]
    deleted: int  # that were saved and are no longer there


@attrs.frozen(kw_only=True)
class Console:
    """What a run printed: the end of its console.log."""

    run: str
    lines: list[str]
    left_out_bytes: int  # before them
    is_there: bool  # the run folder has the file


@attrs.frozen(kw_only=True)
class Layers:
    """A quantity of the experts by layer."""

    tag: str
    x: list[float]
    layers: list[int]
    values: list[Numbers]  # a list a layer


@attrs.frozen(kw_only=True)
class Experts:
    """What there is to see of a run's experts."""

    run: str
    layers: list[int]
    num_experts: int | None
    top_k: int | None
    tags: list[str]
    latest: dict[str, Numbers]  # by tag, a value a layer
    step: int | None  # of `latest`
    steps: list[int]  # that have loads


@attrs.frozen(kw_only=True)
class Load:
    """Rows that went to each expert: at one step by layer, or of one layer by step."""

    run: str
    rows: list[int]  # layers or steps
    step: int | None
    load: list[list[int]]


@attrs.frozen(kw_only=True)
class RankTime:
    """Where the time of a step of one rank goes, mean of the last logged steps."""

    rank: int
    total_s: float
    parts_s: Numbers


@attrs.frozen(kw_only=True)
class Timing:
    """Where the time of a step goes, by rank."""

    run: str
    parts: list[str]
    ranks: list[RankTime]
    slowest: int | None  # rank; None for a single one
    steps: int  # logged steps in the mean


@attrs.frozen(kw_only=True)
class Gpu:
    """A GPU as last seen."""

    rank: int
    index: int
    name: str
    uuid: str
    utilization: float | None
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: float | None
    sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    throttle: list[str]
    ecc_corrected: float | None
    ecc_uncorrected: float | None


@attrs.frozen(kw_only=True)
class GpuCurve:
    """A quantity of each GPU, or of the host, over time."""

    quantity: str
    names: list[str]
    values: list[Numbers]


@attrs.frozen(kw_only=True)
class Gpus:
    """What a run's machine tells."""

    run: str
    driver: str
    cuda: str
    seen: float | None
    gpus: list[Gpu]
    x: list[float]  # hours of training
    curves: list[GpuCurve]
    host: dict[str, Any]


@attrs.frozen(kw_only=True)
class Evaluation:
    """Results at one step."""

    run: str
    attempt: int
    step: int | None
    time: float | None
    results: dict[str, Any]


@attrs.frozen(kw_only=True)
class Score:
    """What `nmoe eval` or an evaluation in training measured of one task, as texts."""

    run: str
    task: str
    value: str
    error: str  # standard error
    items: str
    step: str  # of the training
    at: str


@attrs.frozen(kw_only=True)
class Scored:
    """An evaluation in training."""

    run: str
    attempt: int
    step: int | None
    time: float | None
    scores: dict[str, Numbers]  # by task: the score and its standard error


@attrs.frozen(kw_only=True)
class Evaluations:
    """Validations and evaluations, newest first, and the newest score of each task."""

    names: list[str]  # of results of validations
    rows: list[Evaluation]
    tasks: list[str]  # of evaluations
    scored: list[Scored]
    scores: list[Score]
    problems: list[str]  # files of scores that cannot be read


@attrs.frozen(kw_only=True)
class Sample:
    """A text that a model wrote."""

    run: str
    step: int | None
    time: float | None
    prompt: str
    text: str


@attrs.frozen(kw_only=True)
class Samples:
    """Texts, newest first."""

    samples: list[Sample]


@attrs.frozen(kw_only=True)
class ConfigRow:
    """A key of the configs, with the value of each run; None where a run lacks it."""

    key: str
    values: list[Any]
    differs: bool


@attrs.frozen(kw_only=True)
class Configs:
    """The configs of some runs, side by side, and where they come from."""

    runs: list[str]
    rows: list[ConfigRow]


@attrs.frozen(kw_only=True)
class Shard:
    """A shard of a split."""

    file: str
    tokens: int
    documents: int
    bytes: int
    size_bytes: int | None  # on disk; None: no file
    sha256: str


@attrs.frozen(kw_only=True)
class Split:
    """A split of a data folder."""

    name: str
    tokens: int
    documents: int
    bytes: int
    shards: list[Shard]


@attrs.frozen(kw_only=True)
class Folder:
    """A data folder: what its manifest tells, or what is wrong with it."""

    number: int
    path: str
    tokenizer: str
    tokenizer_size: int | None
    splits: list[Split]
    problems: list[str]


@attrs.frozen(kw_only=True)
class Folders:
    """The data folders under the roots given, and what the runs read of their mixtures."""

    folders: list[Folder]


@attrs.frozen(kw_only=True)
class Source:
    """What a stage of a mixture planned of one source, and what was read."""

    stage: str
    name: str
    planned: int  # tokens
    read: int  # tokens
    left_out: int  # tokens of the plan that are not read since a rewind
    planned_share: float  # of the stage
    read_share: float | None  # of what was read of the stage; None before its first token
    passes: float  # over the source in this stage so far


@attrs.frozen(kw_only=True)
class Mixture:
    """What a run reads, as it reported when it began."""

    run: str
    step: int | None  # up to which it is reported what was read
    sources: list[Source]  # stage by stage; none: a run of one source
    config: dict[str, Any]  # keys of its section `data`


@attrs.frozen(kw_only=True)
class Token:
    """A token, and the bytes it stands for as text."""

    id: int
    text: str


@attrs.frozen(kw_only=True)
class Document:
    """A document, decoded."""

    split: str
    number: int
    documents: int
    num_tokens: int  # without the end of text
    text: str
    tokens: list[Token]
    left_out: int  # tokens beyond what is shown


@attrs.frozen(kw_only=True)
class Problems:
    """Why there is no answer: one line each."""

    problems: list[str]


def numbers(values: np.ndarray) -> Numbers:
    """An array for JSON."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def number(value: Any) -> float | None:
    """A value that a run reported, as a number; None when it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def plain(value: Any) -> Any:
    """A value that a run reported, for JSON: what is not finite becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


SEVERITY = MappingProxyType(
    {"nonfinite": "error", "spike": "warning", "alert": "warning", "resume": "warning", "rewind": "warning"}
)
"""Of the events that are not information only, unless they tell their own."""
