"""Configs: what is read is exactly what was written, and everything wrong is said at once, at its place."""

from __future__ import annotations

import math
import re
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import pytest
import tomli
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmoe.config import Config, annotated, diff, dump, identity, load, load_valid, validate
from nmoe.config.check import kernel_sizes, remarks
from nmoe.config.convert import structure
from nmoe.config.data_mixture import Part, Rest, load_mixture
from nmoe.config.data_source import Source, load_source
from nmoe.config.fields import Key, is_table, keys, members
from nmoe.config.run_name import is_run_name, label
from nmoe.config.secrets import masked, masked_arguments
from nmoe.config.sections import Mixed, Mla, Shards, Stdlib, Yarn
from nmoe.config.toml import lines, literal
from nmoe.errors import InputError
from nmoe.pure.model.attention import KINDS
from tests.configs import ROOT, at_line, problems


def test_each_layer_wins_over_those_before(tmp_path: Path) -> None:
    """Five keys, each set by one more layer than the one before."""
    base, file = tmp_path / "base.toml", tmp_path / "file.toml"
    tables = tomli.loads((ROOT / "configs" / "quickstart.toml").read_text())
    for section, name in (
        ("train", "loss_chunk"),
        ("train", "steps"),
        ("train", "batch_size"),
        ("validation", "every"),
    ):
        tables.setdefault(section, {})[name] = 11
    base.write_text(tomli_w.dumps(tables))
    file.write_text('extends = "base.toml"\n\n[train]\nsteps = 22\nbatch_size = 22\n[validation]\nevery = 22\n')
    environ = {"NMOE_TRAIN__BATCH_SIZE": "33", "NMOE_VALIDATION__EVERY": "33", "NMOE_HOME": "/nowhere", "PATH": "x__y"}
    loaded = load(file, environ, ("--validation.every=44",))
    c, sources = loaded.config, loaded.sources
    assert (c.train.max_nonfinite_steps, c.train.loss_chunk, c.train.steps) == (3, 11, 22)
    assert (c.train.batch_size, c.validation.every) == (33, 44)
    assert sources["train.max_nonfinite_steps"] == "default"
    assert "loss_chunk = 11" in at_line(f"{sources['train.loss_chunk']}: ", base)
    assert sources["train.steps"] == f"{file}:4"
    assert sources["train.batch_size"] == "environment NMOE_TRAIN__BATCH_SIZE"
    assert sources["validation.every"] == "command line --validation.every=44"
    # untouched neighbours of what was merged
    assert c.train.sequence_length == tables["train"]["sequence_length"]


def test_sources_know_every_written_value(tmp_path: Path) -> None:
    loaded = load(ROOT / "configs" / "moonlight.toml", {}, ("--run.name=here",))
    text = annotated(loaded.config, loaded.sources)
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert load(again, {}, ()).config == loaded.config
    assert len(text.splitlines()) == len(loaded.sources)
    assert re.search(r'^run.name = "here" +# command line --run.name=here$', text, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1e-4", 1e-4),
        ("true", True),
        ('"a b"', "a b"),
        ("[1, 2]", [1, 2]),
        ('{kind = "mla"}', {"kind": "mla"}),
        ("bare", "bare"),
        ("True", "True"),
        ("", ""),
        ("1 # note", "1 # note"),
        ("1,", "1,"),
        ("1, 2", "1, 2"),
        ("1\nother = 2", "1\nother = 2"),
        ("1]\nother = [2", "1]\nother = [2"),
        ("9" * 5000, "9" * 5000),
        ("[" * 5000, "[" * 5000),
    ],
    ids=lambda each: repr(each)[:20],
)
def test_values_of_overrides(text: str, value: Any) -> None:
    assert literal(text) == value and type(literal(text)) is type(value)


def test_override_of_a_table_merges() -> None:
    path = ROOT / "configs" / "quickstart.toml"
    before = load(path, {}, ()).config
    after = load(path, {}, ("--model.moe={top_k = 3, route_scale = 2}",)).config
    assert after.model.moe == attrs.evolve(before.model.moe, top_k=3, route_scale=2.0)


KIND, PATH = "--data.source.kind=shards", "--data.source.path=x"


@pytest.mark.parametrize(
    ("environ", "overrides"),
    [
        ({}, (KIND, PATH)),
        ({}, (PATH, KIND)),
        ({}, ('--data.source={kind = "shards", path = "x"}',)),
        ({"NMOE_DATA__SOURCE__KIND": "shards", "NMOE_DATA__SOURCE__PATH": "x"}, ()),
        ({"NMOE_DATA__SOURCE__KIND": "shards"}, (PATH,)),
    ],
)
def test_a_layer_of_another_kind_drops_the_keys_below(environ: dict[str, str], overrides: tuple[str, ...]) -> None:
    """The quickstart reads `stdlib` and says `tokenizer_size`, which shards do not have."""
    loaded = load(ROOT / "configs" / "quickstart.toml", environ, overrides)
    assert loaded.config.data.source == Shards(path="x")
    assert not [key for key in loaded.sources if key.startswith("data.source.token")]


def test_a_preset_is_a_base_by_its_name(tmp_path: Path) -> None:
    """As `nmoe run` takes it; a file of that name has a path, and a name that no preset has an error."""
    file = tmp_path / "x.toml"
    file.write_text('extends = "quickstart"\n[train]\nsteps = 5\n')
    expected = load(ROOT / "configs" / "quickstart.toml", {}, ("--train.steps=5",)).config
    assert load(file, {}, ()).config == expected
    (tmp_path / "quickstart").write_text('extends = "quickstart"\n[train]\nsteps = 7\n')
    file.write_text('extends = "./quickstart"\n')
    assert load(file, {}, ()).config.train.steps == 7
    file.write_text('extends = "quickstrat"\n')
    with pytest.raises(
        InputError, match=r"x.toml:1: extends: expected a TOML file or a preset, .*did you mean quickst"
    ):
        load(file, {}, ())


def test_a_file_of_another_kind_drops_the_keys_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text((ROOT / "configs" / "quickstart.toml").read_text())
    file = tmp_path / "x.toml"
    file.write_text('extends = "base.toml"\n[data.source]\nkind = "shards"\npath = "x"\n')
    assert load(file, {}, ()).config.data.source == Shards(path="x")
    file.write_text('extends = "base.toml"\n[data.source]\nkind = "stdlib"\n')
    assert load(file, {}, ()).config.data.source == Stdlib(tokenizer_size=4096), "the same kind keeps them"
    (problem,) = problems(file, KIND)
    assert problem == (
        f"command line {KIND}: data.source.path: expected a value, got nothing; add it (folder that holds "
        "manifest.json; on resume its path may change, its content not)"
    )
    (problem,) = problems(file, KIND, "--data.source.tokenizer_size=300", PATH)
    assert 'tokenizer_size=300: data.source.tokenizer_size: expected a known key of kind "shards"' in problem
    assert 'got "rnn"' in problems(file, "--model.attention.kind=rnn")[0]


def test_a_base_may_extend_another(tmp_path: Path) -> None:
    """Three files: the upper wins key by key, a key is placed where it stands, and a circle is named."""
    (tmp_path / "lowest.toml").write_text((ROOT / "configs" / "quickstart.toml").read_text())
    (tmp_path / "middle").mkdir()
    (tmp_path / "middle" / "m.toml").write_text('extends = "../lowest.toml"\n[train]\nsteps = 5\nz_loss = 0.5\n')
    top = tmp_path / "top.toml"
    top.write_text('extends = "middle/m.toml"\n[train]\nsteps = 6\n')
    loaded = load(top, {}, ())
    assert (loaded.config.train.steps, loaded.config.train.z_loss) == (6, 0.5)
    assert loaded.sources["train.z_loss"] == f"{tmp_path / 'middle' / 'm.toml'}:4"
    assert loaded.sources["train.batch_size"].startswith(f"{tmp_path / 'middle' / '..' / 'lowest.toml'}:")
    (tmp_path / "lowest.toml").write_text('extends = "top.toml"\n')
    (problem,) = problems(top)
    assert problem.endswith(
        'extends: expected a file that is not laid over this one, got "top.toml"; remove one of the two'
    )


def test_the_last_of_two_overrides_holds() -> None:
    config = load(ROOT / "configs" / "quickstart.toml", {}, ("--train.steps=1", "--train.steps=2")).config
    assert config.train.steps == 2


@pytest.mark.parametrize(
    ("environ", "overrides", "expected"),
    [
        ({"NMOE_TRAIN__STEP": "3"}, (), r"environment NMOE_TRAIN__STEP: train.step: .*did you mean train.steps\?"),
        ({"NMOE_TRAIN_STEPS": "3"}, (), r"environment NMOE_TRAIN_STEPS: .*; did you mean NMOE_TRAIN__STEPS\?"),
        ({"NMOE_MODEL_TOP_K": "3"}, (), r"environment NMOE_MODEL_TOP_K: .*; did you mean NMOE_MODEL__MOE__TOP_K\?"),
        (
            {"NMOE_HOMES": "x"},
            (),
            r"environment NMOE_HOMES: expected NMOE_SECTION__KEY .*; did you mean NMOE_HOME\?",
        ),
        ({"NMOE_ZZZZZZZZZZZZ": "x"}, (), r"environment NMOE_Z+: expected .*, got NMOE_Z+; rename or unset it, .*"),
        ({"NMOE_TOP_K__X": "3"}, (), r"environment NMOE_TOP_K__X: top_k: .*did you mean model.moe.top_k\?"),
        (
            {"NMOE_train__steps": "3"},
            (),
            r"environment NMOE_train__steps: expected upper case, .*write NMOE_TRAIN__STEPS",
        ),
        (
            {"NMOE_TRAIN__": "3"},
            (),
            r'environment NMOE_TRAIN__: train."": expected a known key, got ""; known keys: steps, .*',
        ),
        (
            {},
            ("--train.steps=ten",),
            r'command line --train.steps=ten: train.steps: expected an integer, got "ten"; .*',
        ),
        ({}, ("--train.steps=1e3",), r"command line --train.steps=1e3: train.steps: .* got 1000.0; write 1_000"),
        ({}, ("--train.steps=True",), r'.*: train.steps: expected an integer, got "True"; TOML uses true/false'),
        ({}, ("--train.steps=1\n2",), r".*: train.steps: expected an integer, got .*"),
        ({}, ("--model.top_k=3",), r".*: model.top_k: .*; did you mean model.moe.top_k\?"),
        ({}, ("--train=3",), r"command line --train=3: train: expected a table, got 3; .*"),
        ({}, ("--run.root=\udcff",), r".*: run.root: expected a string of printable characters, got .*"),
        ({}, ("--train.steps",), r"command line --train.steps: expected --section.key=value, got --train.steps; .*"),
        ({}, ('--extends="a.toml"',), r"command line .*: extends: expected a known key, got .*"),
        (
            {},
            (f"--train.steps={2**63}",),
            r".*: train.steps: expected an integer of 64 bits, got 9223372036854775808; .*",
        ),
        ({}, ("--optim.dense.lr=1e999",), r".*: optim.dense.lr: expected a finite number, got inf; .*"),
        ({}, ("--optim.dense.lr=nan",), r".*: optim.dense.lr: expected a finite number, got nan; .*"),
        ({}, (f"--optim.dense.lr={10**400}",), r".*: optim.dense.lr: .* 64 bits .*, got an integer of 1329 bits; .*"),
    ],
    ids=lambda each: repr(each)[:40],
)
def test_wrong_overrides(environ: dict[str, str], overrides: tuple[str, ...], expected: str) -> None:
    (problem,) = problems(ROOT / "configs" / "quickstart.toml", *overrides, environ=environ)
    assert re.fullmatch(expected, problem), problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[model]\nvocab_size = \n", r"x.toml:2: expected TOML, got invalid value; fix column \d+"),
        (b"[model]\nx = True\n", r"x.toml:2: expected TOML, got invalid value; TOML uses true/false"),
        (b"a = 1\na = 2", r"x.toml:2: expected TOML, got cannot overwrite a value; fix column \d+"),
        (b"\n\n# caf\xe9\n", r"x.toml:3: expected text in UTF-8, got the byte 0xe9; save the file as UTF-8"),
        (b"x = " + b"9" * 5000, r"x.toml: expected TOML that can be read, got .*; shorten it"),
        (b"x = " + b"[" * 5000, r"x.toml: expected TOML that can be read, got .*; shorten it"),
        (b"extends = 3", r"x.toml:1: extends: expected a preset or the path of a TOML file, got 3; put it in quotes"),
        (b'extends = "a\\u0000b"', r"x.toml:1: extends: expected a preset or the path of a TOML file, got .*"),
        (b'extends = "absent.toml"', r"x.toml:1: extends: absent.toml: expected an existing file, got none; .*"),
        (
            b'\nextends = "x.toml"',
            r'x.toml:2: extends: expected a file that is not laid over this one, got "x.toml"; .*',
        ),
    ],
    ids=lambda each: repr(each)[:30],
)
def test_files_that_cannot_be_read(
    content: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_bytes(content)
    (problem,) = problems(Path("x.toml"))
    assert re.fullmatch(expected, problem), problem


def test_a_file_of_another_kind_is_named() -> None:
    """A data source where a config is wanted was ten lines about keys."""
    training, source, mixture = (
        ROOT / "configs" / name for name in ("quickstart.toml", "sources/stdlib.toml", "mixtures/local.toml")
    )
    what = {training: "the config of a training", source: "a data source", mixture: "a data mixture"}
    loads: dict[Path, Callable[[Path], object]] = {
        training: lambda path: load(path, {}, ()), source: load_source, mixture: load_mixture,
    }  # fmt: skip
    for own, loader in loads.items():
        loader(own)
        for other in what.keys() - {own}:
            with pytest.raises(InputError) as caught:
                loader(other)
            (problem,) = caught.value.problems
            assert problem.startswith(f"{other}: expected {what[own]}, got {what[other]}; ")
            assert f"`nmoe {'run' if other == training else 'data prep'} {other}" in problem


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").touch()
    (problem,) = problems(tmp_path / "quikstart.toml")
    assert problem.endswith(f"an existing file, got none; did you mean {tmp_path / 'quickstart.toml'}?")
    (problem,) = problems(tmp_path)
    assert problem == f"{tmp_path}: expected a TOML file, got a directory; name a file in it"
    (problem,) = problems(tmp_path / "quickstart.toml" / "x.toml")
    assert "got Not a directory" in problem


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    """Faults of base, file and override, each at its own place."""
    (tmp_path / "base.toml").write_text(
        (ROOT / "configs" / "quickstart.toml").read_text().replace("top_k = 2", "top_k = '2'")
    )
    file = tmp_path / "file.toml"
    file.write_text('extends = "base.toml"\n[model]\nhidden_size = 1.5\n[modle.x]\n')
    found = problems(file, "--run.device=gpu")
    places = {problem.split(": ")[1]: problem.split(": ")[0] for problem in found}
    assert list(places) == ["model.hidden_size", "model.moe.top_k", "run.device", "modle"]
    assert places["model.hidden_size"] == f"{file}:3"
    assert "top_k" in at_line(f"{places['model.moe.top_k']}: ", tmp_path / "base.toml")
    assert places["run.device"] == "command line --run.device=gpu"
    assert places["modle"] == f"{file}:4"


TRICKY = '''\
# [commented.out]
title = "x" # = 1
list = [
  1, # a = 2
  "]",
]
[ "a b" . c ]
"d.e".f = {g = 1, h = {i = 2}}
text = """
[not.a.table]
key = 1
"""
literal = \'\'\'
"""\'\'\'
[[many]]
last = 1
'''


@pytest.mark.parametrize("text", [TRICKY, TRICKY.replace("\n", "\r\n")], ids=["lf", "crlf"])
def test_lines_of_keys(text: str) -> None:
    where = lines(text)
    assert {key: line for key, line in where.items() if len(key) > 1} == {
        ("a b", "c"): 7,
        ("a b", "c", "d.e"): 8,
        ("a b", "c", "d.e", "f"): 8,
        ("a b", "c", "d.e", "f", "g"): 8,
        ("a b", "c", "d.e", "f", "h"): 8,
        ("a b", "c", "d.e", "f", "h", "i"): 8,
        ("a b", "c", "text"): 9,
        ("a b", "c", "literal"): 13,
        ("many", "last"): 16,
    }
    assert {key[0]: line for key, line in where.items() if len(key) == 1} == {
        "title": 2,
        "list": 3,
        "a b": 7,
        "many": 15,
    }


@attrs.frozen(kw_only=True)
class Window:
    kind: ClassVar[str] = "window"
    size: int
    causal: bool = True


@attrs.frozen(kw_only=True)
class Layer:
    attention: Mla | Window
    mode: Literal["a", "b"] = "a"


def test_a_new_kind_is_one_more_class_in_the_union() -> None:
    assert structure({"attention": {"kind": "window", "size": 3}}, Layer) == Layer(attention=Window(size=3))
    faults = structure({"attention": {"kind": "windw", "size": 3}, "mode": 1}, Layer)
    assert isinstance(faults, tuple)
    assert [(".".join(fault.path), fault.text) for fault in faults] == [
        ("attention.kind", 'expected one of "mla", "window", got "windw"; did you mean "window"?'),
        ("mode", 'expected one of "a", "b", got 1; choose one of them'),
    ]
    faults = structure({"attention": {"kind": "window", "size": True, "causal": "False"}}, Layer)
    assert isinstance(faults, tuple)
    assert [fault.text for fault in faults] == [
        "expected an integer, got true; write a whole number without quotes",
        'expected true or false, got "False"; TOML uses true/false',
    ]


def anything(tp: Any) -> st.SearchStrategy[Any]:
    """Any value of a key's type, in bounds or not."""
    if typing.get_origin(tp) in (typing.Union, types.UnionType):
        return st.one_of(*(anything(member) for member in typing.get_args(tp)))
    if typing.get_origin(tp) is Literal:
        return st.sampled_from(typing.get_args(tp))
    if attrs.has(tp):
        hints = typing.get_type_hints(tp)
        return st.builds(tp, **{field.name: anything(hints[field.name]) for field in attrs.fields(tp)})
    return {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.just(0.0) | st.floats(1e-30, 1e30) | st.floats(-1e30, -1e-30),
        str: st.text(st.characters(categories=("L", "M", "N", "P", "S"), include_characters=" ")),  # `str.isprintable`
        types.NoneType: st.none(),
    }[tp]


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(config=anything(Config))
def test_loading_what_was_dumped_gives_it_again(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "dumped.toml"
    file.write_text(dump(config), encoding="utf-8")
    loaded = load(file, {}, ())
    assert loaded.config == config
    assert dump(loaded.config) == dump(config) and identity(loaded.config) == identity(config)
    for path, source in loaded.sources.items():
        name, _, line = source.rpartition(":")
        assert name == str(file), (path, source)
        assert file.read_text(encoding="utf-8").split("\n")[int(line) - 1].startswith(f"{path.rpartition('.')[2]} = ")


FREE_ON_RESUME = {
    "data.prefetch",
    "train.steps",
    "train.microbatch_size",
    "train.loss_chunk",
    "train.max_nonfinite_steps",
    "train.deterministic",
    "train.recompute",
    "train.graph",
    "train.resume",
    "train.warm_start",
    "validation.every",
    "validation.tokens",
    "run.device",
    "run.kernels",
    "run.root",
    "run.name",
    "parallel.ranks",
    "parallel.experts",
    "parallel.capacity",
    "parallel.dedup",
    "parallel.timeout_s",
    "parallel.transport",
    "sample.every",
    "sample.prompt",
    "checkpoint.every",
    "checkpoint.minutes",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "precision.emulate",
    "checkpoint.keep_best",
    "checkpoint.on_error",
    "checkpoint.asynchronous",
    "checkpoint.grace_s",
    "eval.every",
    "eval.suite",
    "eval.limit",
    "memory.expandable_segments",
    "memory.fraction",
    "memory.pinned",
    "log.every",
    "log.arrays_every",
    "log.telemetry_every_s",
    "log.heartbeat_every_s",
    "log.footer",
    "log.alert_spike",
    "log.alert_dead",
    "log.alert_drop",
    "log.alert_wait",
    "log.alert_disk_gb",
    "log.alert_command",
    "log.alert_timeout_s",
}


OTHER_VALUES = {
    "document_mask": "true",
    **dict.fromkeys(("optim.dense.optimizer", "optim.expert.optimizer"), "adamw"),
    "dedup": "false",
    **{
        "compute": "bf16",
        "moments": "bf16",
        "device": "cuda",
        "root": "x",
        "name": "x",
        "prompt": "x",
        "suite": "probes",
        "transport": "proxy",
        "kernels": "torch",
    },
    **{"normalize": "false", "footer": "false", "alert_dead": "0.7", "alert_drop": "0.7", "alert_wait": "0.7"},
    **{"keep_best": "false", "asynchronous": "false", "on_error": "continue", "resume": "x"},
    **{"deterministic": "false", "graph": "true", "recompute": "full", "emulate": "true"},
    **{"expandable_segments": "true", "fraction": "0.5", "pinned": "false"},
    **{"balance": "quantile", "optimizer": "muon", "score": "softmax", "biases": "true"},
}
"""Other values of the keys that are no numbers."""


def test_identity_is_of_what_must_not_change() -> None:
    path = ROOT / "configs" / "quickstart.toml"
    name, rate = "--run.name=first", "--model.moe.bias_update_rate=0.005"  # which else follows the number of steps
    before = load(path, {}, (name, rate))
    for key, source in before.sources.items():
        value = OTHER_VALUES.get(key, OTHER_VALUES.get(key.split(".")[-1], "77"))
        if not key.endswith(".kind"):
            after = load(path, {}, (name, rate, f"--{key}={value}")).config
            assert after != before.config, (key, source)
            assert (identity(after) == identity(before.config)) == (key in FREE_ON_RESUME), key
    with_yarn = load(path, {}, (name, rate, "--model.attention.yarn={factor = 2, original_positions = 128}")).config
    assert identity(with_yarn) != identity(before.config)


@pytest.mark.parametrize(("key", "value"), [("biases", "true"), ("swiglu_limit", "7.0")])
def test_experts_in_fewer_bits_have_no_biases_and_no_clamp(key: str, value: str) -> None:
    config = rules_config(f"model.moe.{key}={value}", 'precision.compute="mxfp8"', "precision.emulate=true")
    wrong = [problem for problem in validate(config, 1) if problem.startswith("precision.compute")]
    assert wrong == [
        f'precision.compute: expected "bf16" beside model.moe.{key}, got "mxfp8"; write it, experts in fewer bits have '
        "neither"
    ]


@pytest.mark.parametrize(
    ("keys", "moved"),
    [
        ((), True),
        (("--model.moe.bias_update_rate=0.005",), False),
        (("--model.moe.balance=quantile",), False),
        (("--model.num_dense_layers=3",), False),
    ],
    ids=["sign steps of the run", "written", "quantiles", "no experts"],
)
def test_sign_steps_that_follow_the_number_of_steps_make_another_run(keys: tuple[str, ...], moved: bool) -> None:
    """Of 700 steps they are 0.005, of 1,400 half of it; above 3,500 all are 0.001."""
    path = ROOT / "configs" / "quickstart.toml"

    def of(steps: int) -> str:
        return identity(load_valid(path, {}, (*keys, f"--train.steps={steps}")).config)

    assert (of(700) != of(1400)) == moved and of(4000) == of(8000)
    if not keys:
        assert of(700) == identity(load_valid(path, {}, ("--model.moe.bias_update_rate=0.005",)).config)


def test_a_schedule_in_shares_is_the_run_of_its_tokens(tmp_path: Path) -> None:
    """A later layer gives a length in another form; the identity has tokens, and changes with the length of the run."""
    path = ROOT / "configs" / "quickstart.toml"
    shares = load_valid(path, {}, ("--schedule.warmup=0.05", "--schedule.decay=0.6")).config
    written = shares.schedule
    assert (written.warmup, written.warmup_tokens, written.hold_tokens, written.decay) == (0.05, 0, None, 0.6)
    tokens = ("--schedule.warmup_tokens=75776", "--schedule.hold_tokens=530432", "--schedule.decay_tokens=909312")
    assert identity(shares) == identity(load_valid(path, {}, tokens).config)
    longer = load_valid(path, {}, ("--schedule.warmup=0.05", "--schedule.decay=0.6", "--train.steps=901")).config
    assert identity(longer) != identity(shares)
    file = tmp_path / "shares.toml"
    file.write_text(dump(shares))
    back = ("--schedule.hold_tokens=5", "--schedule.decay_tokens=6")
    assert load_valid(file, {}, back).config.schedule.decay is None
    assert problems(file, "--schedule.decay_tokens=6", valid=True) == [
        f"{file}: schedule.hold_tokens: expected a value, got nothing; add it, or write schedule.decay as a share of "
        "the run in the place of hold_tokens and decay_tokens"
    ]


def test_a_run_that_ends_within_its_schedule_is_named() -> None:
    path = ROOT / "configs" / "quickstart.toml"
    for constant in ((), ("--schedule.decay_tokens=0",)):
        (text,) = remarks(load_valid(path, {}, ("--train.steps=49", *constant)).config)
        assert text == (
            "schedule.warmup_tokens: the run ends at 100,352 tokens, within its warm-up of 102,400; raise train.steps, "
            "or write schedule.warmup"
        )
    (text,) = remarks(load_valid(path, {}, ("--train.steps=100",)).config)
    assert text == (
        "schedule.decay_tokens: the run ends at 204,800 tokens, before its decay begins at 561,152; raise train.steps, "
        "or write schedule.decay"
    )
    for override in ("--train.steps=275", "--schedule={warmup = 0.1, decay = 0.1}", "--schedule.decay_tokens=0"):
        assert remarks(load(path, {}, ("--train.steps=100", override)).config) == (), override


def test_diff_names_what_differs() -> None:
    left = load(ROOT / "configs" / "quickstart.toml", {}, ()).config
    right = attrs.evolve(
        left, run=attrs.evolve(left.run, name="x"), log=attrs.evolve(left.log, every=left.log.every + 1)
    )
    assert [(each.path, each.left, each.right) for each in diff(left, right)] == [
        ("log.every", left.log.every, left.log.every + 1),
        ("run.name", None, "x"),
    ]
    assert diff(left, left) == ()


RULES = [
    (
        "model.attention.qk_rope_head_dim=15",
        1,
        "model.attention.qk_rope_head_dim: expected an even number, got 15; write 16, ",
    ),
    ("model.moe.top_k=17", 1, "model.moe.top_k: expected at most num_experts = 16, got 17; "),
    ("model.moe.num_groups=3", 1, "model.moe.num_groups: expected a divisor of num_experts = 16, got 3; "),
    ("model.moe.num_groups=16", 1, "model.moe.num_groups: expected groups of two experts at least, got 16 "),
    ("model.moe.top_k_groups=2", 1, "model.moe.top_k_groups: expected at most num_groups = 1, got 2; "),
    (
        "model.moe={num_groups = 8, top_k = 3}",
        1,
        "model.moe.top_k: expected at most the 2 experts in top_k_groups = 1 groups, got 3; ",
    ),
    (
        'model.moe={balance = "quantile", num_groups = 2}',
        1,
        'model.moe.balance: expected "sign" when num_groups is 2, got "quantile"; ',
    ),
    (
        'model.moe={balance = "quantile", top_k = 16}',
        1,
        'model.moe.balance: expected "sign" when top_k is num_experts = 16, got "quantile"; ',
    ),
    (
        'optim.router.optimizer="muon"',
        1,
        'optim.router.optimizer: expected "adamw", got "muon"; write "adamw", a router has no hidden matrix',
    ),
    (
        'optim={muon_heads = "apart", dense.optimizer = "adamw"}',
        1,
        'optim.muon_heads: expected optim.dense.optimizer = "muon" beside it, got "adamw"; remove the key, or write ',
    ),
    (
        "model.moe.top_k=1",
        1,
        "model.moe.normalize: expected false when top_k is 1, got true; ",
    ),
    ("model.num_dense_layers=5", 1, "model.num_dense_layers: expected at most num_layers = 4, got 5; "),
    ("model.max_positions=255", 1, "train.sequence_length: expected at most model.max_positions = 255, got 256; "),
    (
        "model.attention.yarn={factor = 1.5, original_positions = 128}",
        1,
        "model.attention.yarn.factor: expected original_positions * factor at least max_positions = 256, got 128 * 1.5",
    ),
    (
        "model.attention.yarn={factor = 2, original_positions = 128, beta_slow = 32}",
        1,
        "model.attention.yarn.beta_slow: expected below beta_fast = 32.0, got 32.0; ",
    ),
    ("model.mtp.depth=0", 1, "model.mtp.depth: expected at least 1, got 0; raise it"),
    ("model.mtp={depth = 1, weight = -0.1}", 1, "model.mtp.weight: expected at least 0, got -0.1; raise it"),
    ("model.mtp={depth = 1, later_weight = -1}", 1, "model.mtp.later_weight: expected at least 0, got -1.0; raise it"),
    ("train.batch_size=24", 1, "train.batch_size: expected a multiple of ranks * microbatch_size = 1 * 16, got 24; "),
    (
        "train={batch_size = 36, microbatch_size = 12}",
        2,
        "train.batch_size: expected a multiple of ranks * microbatch_size = 2 * 12, ",
    ),
    (
        "train={batch_size = 3, microbatch_size = 1}",
        3,
        "model.moe.num_experts: expected a multiple of the 3 ranks, got 16; ",
    ),
    (
        "data.source.tokenizer_size=4097",
        1,
        "data.source.tokenizer_size: expected at most model.vocab_size = 4096, got 4097; ",
    ),
    (
        "train={steps = 1_000_000_000, batch_size = 1_048_576, microbatch_size = 1}",
        1,
        "train.steps: expected at most 2**53 tokens in all, ",
    ),
    ("schedule={hold_tokens = 0, decay_tokens = 0, floor = 0}", 1, "schedule.floor: expected above 0 when "),
    ("schedule={decay = 1.5}", 1, "schedule.decay: expected at most 1, got 1.5; "),
    ("schedule={warmup = -0.1}", 1, "schedule.warmup: expected at least 0, got -0.1; "),
    (
        "schedule={warmup = 0.5, decay = 0.6}",
        1,
        "schedule.decay: expected what a warm-up of 0.5 leaves of the run's 3031040 tokens, got 0.6; ",
    ),
    (
        "schedule={decay = 0.98}",
        1,
        "schedule.decay: expected what a warm-up of 102400 tokens leaves of the run's 3031040 tokens, got 0.98; ",
    ),
    (
        "schedule={warmup = 0.1, warmup_tokens = 5}",
        1,
        "schedule.warmup: expected no share beside warmup_tokens = 5, got 0.1; ",
    ),
    (
        "schedule={decay = 0.5, hold_tokens = 5, decay_tokens = 0}",
        1,
        "schedule.decay: expected no share beside hold_tokens and decay_tokens, got 0.5; ",
    ),
    ("model.hidden_size=126", 1, "model.hidden_size: expected a multiple of 4 in fp32, "),
    ("model.moe.intermediate_size=126", 1, "model.moe.intermediate_size: expected a multiple of 4 in fp32, "),
    ("run.name=.hidden", 1, "run.name: "),
    ("run.name=a/b", 1, "run.name: "),
    ("run.name=", 1, "run.name: "),
    (f"run.name={'a' * 129}", 1, "run.name: "),
]


@pytest.mark.parametrize(("override", "world", "expected"), RULES, ids=[rule[0][:60] for rule in RULES])
def test_rules(override: str, world: int, expected: str) -> None:
    (problem,) = validate(rules_config(override), world)
    assert problem.startswith(expected), problem


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_kv_heads": 3},
            "num_kv_heads: expected a divisor of num_heads = 4, got 3; choose groups of the same size",
        ),
        ({"head_dim": 15}, "head_dim: expected an even number, got 15; write 16, channels are rotated in pairs"),
        ({"window": 0}, "window: expected at least 1, got 0; raise it"),
        ({"window": None}, "global_every: expected a window beside it, got 2 alone; write window or remove "),
        ({"global_every": 4}, "global_every: expected at most num_layers = 3, got 4; lower it, or remove it "),
        ({"global_every": 1}, "global_every: expected at least 2, got 1; raise it"),
        (
            {"yarn": Yarn(factor=1.5, original_positions=64)},
            "yarn.factor: expected original_positions * factor at least max_positions = 128, got 64 * 1.5; ",
        ),
    ],
    ids=str,
)
def test_rules_of_grouped_query_attention(changes: dict[str, Any], expected: str) -> None:
    config = load(ROOT / "configs" / "quickstart-gqa.toml", {}, ()).config
    assert validate(config, 1) == ()
    attention = attrs.evolve(config.model.attention, **changes)
    (problem,) = validate(attrs.evolve(config, model=attrs.evolve(config.model, attention=attention)), 1)
    assert problem.startswith(f"model.attention.{expected}"), problem


@pytest.mark.parametrize(("preset", "kind"), [("gqa", "gqa"), ("kda", "mixed"), ("nsa", "nsa"), ("dsa", "dsa")])
def test_scores_are_limited_where_heads_have_keys_of_their_own(preset: str, kind: str) -> None:
    config = load(ROOT / "configs" / f"quickstart-{preset}.toml", {}, ("--optim.qk_clip=100",)).config
    (problem,) = validate(config, 1)
    assert problem.startswith(f'optim.qk_clip: expected model.attention.kind = "mla" beside it, got "{kind}"; remove ')
    assert validate(rules_config("optim.qk_clip=100"), 1) == ()
    (problem,) = validate(rules_config("optim.qk_clip=0"), 1)
    assert problem == "optim.qk_clip: expected above 0, got 0.0; raise it"


MIXED_RULES = [
    (
        "--model.attention.pattern=",
        'pattern: expected a letter at least, got ""; write "ab" for layers a and b in turn',
    ),
    ("--model.attention.pattern=abab", "pattern: expected at most num_layers = 3 letters, got 4; shorten it"),
    ("--model.attention.last=abab", "last: expected at most num_layers = 3 letters, got 4; shorten it"),
    ("--model.attention.pattern=ad", 'pattern: expected letters of the tables a, b, got "ad"; choose others or write '),
    (
        "--model.attention.last=",
        "b: expected a layer with it, got none of 3; write its letter into pattern or last, or ",
    ),
    ("--model.attention.b.qk_rope_head_dim=15", "b.qk_rope_head_dim: expected an even number, got 15; write 16, "),
    (
        "--model.attention.b.yarn={factor = 2, original_positions = 128}",
        'b.yarn: expected no table beside position = "none", got one; remove one of the two',
    ),
    ("--model.attention.a.conv_size=0", "a.conv_size: expected at least 1, got 0; raise it"),
    ("--model.attention.a.decay_limit=0", "a.decay_limit: expected above 0, got 0.0; raise it"),
]


@pytest.mark.parametrize(("override", "expected"), MIXED_RULES, ids=[rule[0] for rule in MIXED_RULES])
def test_rules_of_mixed_attention(override: str, expected: str) -> None:
    path = ROOT / "configs" / "quickstart-kda.toml"
    assert problems(path, valid=True) == []
    (problem,) = problems(path, override, valid=True)
    assert f": model.attention.{expected}" in problem, problem


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.kind=flash", 'model.attention.a.kind: expected one of "mla", "gqa", "kda", "nsa", "dsa", got "flash"; '),
        ("a.kind=mixed", 'model.attention.a.kind: expected one of "mla", "gqa", "kda", "nsa", "dsa", got "mixed"; '),
        ("a.window=128", 'model.attention.a.window: expected a known key of kind "kda", got "window"; '),
        ("a.sinks=true", 'model.attention.a.sinks: expected a known key of kind "kda", got "sinks"; '),
        (
            "a.yarn={factor = 2, original_positions = 128}",
            'model.attention.a.yarn: expected a known key of kind "kda", got "yarn"; ',
        ),
        ("d={kind = 'kda'}", 'model.attention.d: expected a known key of kind "mixed", got "d"; '),
    ],
)
def test_keys_that_a_part_of_a_mixed_attention_does_not_have(override: str, expected: str) -> None:
    (problem,) = problems(ROOT / "configs" / "quickstart-kda.toml", f"--model.attention.{override}")
    assert expected in problem and "\n" not in problem, problem


def test_a_mixed_attention_is_written_and_read_like_any_other() -> None:
    path = ROOT / "configs" / "quickstart-kda.toml"
    loaded = load(path, {"NMOE_MODEL__ATTENTION__A__NUM_HEADS": "2"}, ("--model.attention.b.kv_lora_rank=32",))
    attention = loaded.config.model.attention
    assert isinstance(attention, Mixed)
    assert (attention.a.num_heads, attention.b.num_heads, attention.last) == (2, 4, "b")
    assert loaded.sources["model.attention.b.kv_lora_rank"].startswith("command line")
    assert loaded.sources["model.attention.pattern"].startswith(str(path))
    assert identity(loaded.config) != identity(load(path, {}, ()).config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_kv_heads": 3},
            "num_kv_heads: expected a divisor of num_heads = 4, got 3; choose groups of the same size",
        ),
        ({"head_dim": 15}, "head_dim: expected an even number, got 15; write 16, channels are rotated in pairs"),
        ({"window": 0}, "window: expected at least 1, got 0; raise it"),
        ({"num_selected": 0}, "num_selected: expected at least 3, got 0; raise it"),
        ({"selected_block": 0}, "selected_block: expected at least 1, got 0; raise it"),
        ({"compressed_stride": 0}, "compressed_stride: expected at least 1, got 0; raise it"),
        (
            {"compressed_block": 10},
            "compressed_stride: expected a divisor of compressed_block = 10, got 4; choose blocks of whole strides",
        ),
        (
            {"selected_block": 6},
            "compressed_stride: expected a divisor of selected_block = 6, got 4; choose blocks of whole strides",
        ),
    ],
    ids=str,
)
def test_rules_of_native_sparse_attention(changes: dict[str, Any], expected: str) -> None:
    config = load(ROOT / "configs" / "quickstart-nsa.toml", {}, ()).config
    assert validate(config, 1) == ()
    attention = attrs.evolve(config.model.attention, **changes)
    (problem,) = validate(attrs.evolve(config, model=attrs.evolve(config.model, attention=attention)), 1)
    assert problem.startswith(f"model.attention.{expected}"), problem


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"index_top_k": 0}, "index_top_k: expected at least 1, got 0; raise it"),
        ({"index_loss": 0.0}, "index_loss: expected above 0, got 0.0; raise it"),
        ({"index_head_dim": 6}, "index_head_dim: expected at least qk_rope_head_dim = 8, got 6; raise it, that many "),
        (
            {"qk_rope_head_dim": 7},
            "qk_rope_head_dim: expected an even number, got 7; write 8, channels are rotated in ",
        ),
    ],
    ids=str,
)
def test_rules_of_sparse_latent_attention(changes: dict[str, Any], expected: str) -> None:
    config = load(ROOT / "configs" / "quickstart-dsa.toml", {}, ()).config
    assert validate(config, 1) == ()
    attention = attrs.evolve(config.model.attention, **changes)
    (problem,) = validate(attrs.evolve(config, model=attrs.evolve(config.model, attention=attention)), 1)
    assert problem.startswith(f"model.attention.{expected}"), problem


def test_a_recorded_step_has_no_warm_up() -> None:
    config = load(ROOT / "configs" / "quickstart-dsa.toml", {}, ()).config
    on_gpu = attrs.evolve(
        config,
        run=attrs.evolve(config.run, device="cuda"),
        precision=attrs.evolve(config.precision, compute="bf16"),
        train=attrs.evolve(config.train, graph=True),
    )
    (problem,) = validate(on_gpu, 1)
    assert problem.startswith(
        "train.graph: expected false when model.attention.index_warmup_tokens is above 0, got true"
    )
    sparse = attrs.evolve(config.model.attention, index_warmup_tokens=0)
    assert validate(attrs.evolve(on_gpu, model=attrs.evolve(config.model, attention=sparse)), 1) == ()


def test_a_kind_without_kernels_is_named_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sections, which know no torch, and the kinds themselves say the same."""
    assert all(section.has_kernels == (kind.kernel_kept_bytes is not None) for section, kind in KINDS.items())
    on_gpu, on_cpu, *others = (
        load(ROOT / "configs" / f"{name}.toml", {}, ()).config
        for name in ("deepseek-v3.2", "quickstart-dsa", "kimi-linear-48b", "gpt-oss-20b", "moonlet")
    )
    assert [remarks(config) for config in (on_gpu, on_cpu, *others)] == [(), (), (), (), ()], "all have kernels"
    monkeypatch.setattr(type(on_gpu.model.attention), "has_kernels", False)
    (remark,) = remarks(on_gpu)
    assert remark.startswith('model.attention.kind: "dsa" has no kernels, a GPU runs it as plain torch')
    assert [remarks(config) for config in (on_cpu, *others)] == [(), (), (), ()]


def test_what_the_sparse_kernels_do_not_take_is_named() -> None:
    """And what those of `mla`, which the dense stage runs on, do not."""
    config = load(ROOT / "configs" / "deepseek-v3.2.toml", {}, ()).config
    small = load(ROOT / "configs" / "quickstart-dsa.toml", {}, ()).config
    assert tuple(kernel_sizes(config.model, device="cuda", compute="bf16")) == ()
    assert tuple(kernel_sizes(small.model, device="cuda", compute="bf16")) == ()
    assert remarks(small) == () and remarks(attrs.evolve(config, run=attrs.evolve(config.run, device="cpu"))) == ()
    warm = attrs.evolve(config.model.attention, index_warmup_tokens=1)
    model, run = attrs.evolve(config.model, attention=warm), attrs.evolve(config.run, device="cuda")
    assert [line for line in remarks(attrs.evolve(config, model=model, run=run)) if "attention" in line] == []
    odd = attrs.evolve(config.model.attention, qk_nope_head_dim=100, v_head_dim=264)
    model = attrs.evolve(config.model, attention=odd)
    assert tuple(kernel_sizes(model, device="cuda", compute="bf16")) == ()
    model = attrs.evolve(config.model, attention=attrs.evolve(odd, index_warmup_tokens=1))
    assert [line.split(" for ")[0] for line in kernel_sizes(model, device="cuda", compute="bf16")] == [
        "model.attention.qk_nope_head_dim: expected a multiple of 8 up to 256",
        "model.attention.v_head_dim: expected a multiple of 8 up to 256",
    ]
    wide = {"kv_lora_rank": 520, "qk_rope_head_dim": 12, "index_num_heads": 65, "index_head_dim": 130}
    model = attrs.evolve(config.model, attention=attrs.evolve(config.model.attention, **wide))
    told = [
        f"{key}: expected" in line
        for key, line in zip(wide, kernel_sizes(model, device="cuda", compute="bf16"), strict=True)
    ]
    assert told == [True] * 4
    assert tuple(kernel_sizes(model, device="cpu", compute="bf16")) == ()


def test_what_the_kernels_of_native_sparse_attention_do_not_take_is_named() -> None:
    """A group of 64 heads and the paper's sizes are taken."""
    config = load(ROOT / "configs" / "quickstart-nsa.toml", {}, ()).config
    paper = {"num_heads": 64, "num_kv_heads": 1, "head_dim": 192, "v_head_dim": 128, "selected_block": 64}
    wide = {"head_dim": 200, "v_head_dim": 130, "selected_block": 72, "num_kv_heads": 1}
    found = [
        tuple(kernel_sizes(attrs.evolve(config.model, attention=section), device="cuda", compute="bf16"))
        for section in (
            config.model.attention,
            attrs.evolve(config.model.attention, **paper),
            attrs.evolve(config.model.attention, **wide, num_heads=65),
        )
    ]
    assert found[:2] == [(), ()]
    assert [f"{key}: expected" in line for key, line in zip(wide, found[2], strict=True)] == [True] * 4


@pytest.mark.parametrize(("size", "wrong"), [(64, False), (128, False), (32, True), (96, True), (256, True)])
def test_heads_that_the_kernels_of_grouped_queries_take(size: int, wrong: bool) -> None:
    config = load(ROOT / "configs" / "gpt-oss-20b.toml", {}, (f"--model.attention.head_dim={size}",)).config
    told = f"model.attention.head_dim: expected 64 or 128 for the attention kernels, got {size}; write one of them"
    assert validate(config, 8) == ((told,) if wrong else ())


@pytest.mark.parametrize(("size", "wrong"), [(64, False), (128, False), (32, True), (96, True), (256, True)])
def test_heads_that_the_kernels_of_the_delta_rule_take(size: int, wrong: bool) -> None:
    """As a part of mixed layers."""
    config = load(ROOT / "configs" / "kimi-linear-48b.toml", {}, (f"--model.attention.a.head_dim={size}",)).config
    told = f"model.attention.a.head_dim: expected 64 or 128 for the attention kernels, got {size}; write one of them"
    assert validate(config, 8) == ((told,) if wrong else ())


def rules_config(*overrides: str) -> Config:
    """The quickstart with the sizes the rules are written for."""
    sizes = ("--model={vocab_size = 4096, num_layers = 4, max_positions = 256, moe = {num_experts = 16, top_k = 2}}",)
    sizes += ("--train={batch_size = 16, microbatch_size = 16, sequence_length = 256}",)
    sizes += ("--data.source.tokenizer_size=4096",)
    return load(ROOT / "configs" / "quickstart.toml", {}, (*sizes, *(f"--{each}" for each in overrides))).config


@pytest.mark.parametrize(
    "override",
    [
        "model.moe={num_groups = 8, top_k_groups = 1, top_k = 2}",
        "model.moe={top_k = 1, normalize = false}",
        'model.moe={top_k = 15, balance = "quantile"}',
        "model={num_dense_layers = 4, moe = {top_k = 1}}",
        "model.attention.yarn={factor = 2, original_positions = 128}",
        "run.name=9.A_b-c",
        f"run.name={'a' * 128}",
        "data.source.tokenizer_size=4096",
        "model.num_dense_layers=3",
    ],
)
def test_what_just_fulfils_the_rules(override: str) -> None:
    assert validate(rules_config(override), 1) == ()


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [
        (16, 16, 1, {}),
        (16, 16, 2, {"microbatch_size": 8}),
        (24, 8, 4, {"microbatch_size": 6}),
        (8, 8, 64, {"batch_size": 64, "microbatch_size": 1}),
        (100, 8, 8, {"batch_size": 128}),
        (72, 8, 8, {"microbatch_size": 3}),
        (7, 4, 2, {"batch_size": 8, "microbatch_size": 4}),
        (7, 4, 3, {"batch_size": 6, "microbatch_size": 2}),
        (15360, 4, 1000, {"batch_size": 16000}),
    ],
)
def test_the_nearest_batch_that_ranks_share(batch: int, micro: int, world: int, expected: dict[str, int]) -> None:
    """One that divides stays; what is proposed is what --fit does, and no rule is broken then."""
    path = ROOT / "configs" / "quickstart.toml"
    sizes = (f"--train.batch_size={batch}", f"--train.microbatch_size={micro}", "--model.moe.num_experts=48000")
    before, after = load(path, {}, sizes), load_valid(path, {}, sizes, world, fit=True)
    changed = {key: size for key, size in expected.items() if size != getattr(before.config.train, key)}
    assert {each.path.removeprefix("train."): each.right for each in after.fitted} == changed
    assert all(after.sources[f"train.{key}"] == "--fit" for key in changed)
    if changed:
        (problem,) = validate(before.config, world)
        written = " and ".join(f"train.{key} = {size}" for key, size in changed.items())
        assert problem.endswith(f"; write {written}, or pass --fit to `nmoe run` and `nmoe plan`")
    assert attrs.evolve(after.config, train=before.config.train) == before.config, "nothing else"


def test_a_row_has_a_token_at_every_depth() -> None:
    assert validate(rules_config("train.sequence_length=8", "model.mtp.depth=7"), 1) == ()
    (problem,) = validate(rules_config("train.sequence_length=8", "model.mtp.depth=8"), 1)
    assert problem.startswith("model.mtp.depth: expected below train.sequence_length = 8, got 8; lower it, ")


def test_ranks_share_out_the_experts_evenly() -> None:
    """16 experts, as many sequences a step as every number of ranks here divides."""
    sizes = "train={steps = 1, batch_size = 24, microbatch_size = 1, sequence_length = 16}"

    def found(world: int, *overrides: str) -> tuple[str, ...]:
        return validate(rules_config(sizes, *overrides), world)

    assert found(8) == found(8, "parallel.experts=4") == found(6, "parallel.experts=2") == ()
    (problem,) = found(6)
    assert problem.startswith("model.moe.num_experts: expected a multiple of the 6 ranks, got 16; ")
    assert "parallel.experts" in problem
    (problem,) = found(3, "parallel.experts=3")
    assert problem.startswith("parallel.experts: expected a divisor of model.moe.num_experts = 16, got 3; ")
    (problem,) = found(6, "parallel.experts=4")
    assert problem.startswith("parallel.experts: expected a divisor of the 6 ranks, got 4; ")
    (problem,) = found(2, "parallel.capacity=0.9")
    assert problem.startswith("parallel.capacity: expected 0 or at least 1, got 0.9; ")


def test_zeros_break_their_bounds_only() -> None:
    found = validate(rules_config("train.microbatch_size=0", "model.moe.num_groups=0", "parallel.ranks=0"), 0)
    assert {problem.split(":")[0] for problem in found} == {
        "train.microbatch_size",
        "model.moe.num_groups",
        "model.moe.top_k_groups",
        "parallel.ranks",
    }


def test_a_nan_breaks_bounds() -> None:
    config = rules_config()
    yarn = Yarn(factor=math.nan, original_positions=256)
    attention = attrs.evolve(config.model.attention, yarn=yarn)
    found = validate(attrs.evolve(config, model=attrs.evolve(config.model, attention=attention)), 1)
    assert "model.attention.yarn.factor: expected above 1, got nan; raise it" in found


def test_problems_of_rules_have_places() -> None:
    path = ROOT / "configs" / "quickstart.toml"
    (top_k, ranks) = problems(path, "--model.moe.top_k=99", "--parallel.ranks=0", valid=True)[::-1]
    assert top_k.startswith("command line --model.moe.top_k=99: model.moe.top_k: expected at most num_experts")
    assert ranks.startswith("command line --parallel.ranks=0: parallel.ranks: expected at least 1, got 0")
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(path))}:\d+: model.moe.num_experts: expected a multiple of the 5 ranks"
    ):
        load_valid(path, {}, (), world=5)


LINES = 10_000
UNKNOWN = (ROOT / "configs" / "quickstart.toml").read_text() + "".join(f"[trian{i}]\n" for i in range(LINES))
LONG_WORD = (ROOT / "configs" / "quickstart.toml").read_text().replace('"cpu"', f'"{"cpu" * 500_000}"')


@pytest.mark.parametrize(
    "text",
    [
        "x = [\n" + "1,\n" * LINES + "]\n",
        "x = [\n" + '\'a\',\n"b\\"", # ]\n' * LINES + "]\n",
        'x = """\n' + "a # [\n" * LINES + '"""\n',
        "".join(f"x{i} = [\n1,\n]\n" for i in range(LINES)),
        "".join(f"[a{i}]\nb = 1\n" for i in range(LINES)),
        UNKNOWN,
        LONG_WORD,
    ],
    ids=["array", "strings", "multi-line", "arrays", "tables", "unknown tables", "long word"],
)
def test_reading_takes_time_in_proportion_to_the_text(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(text)
    began = time.process_time()
    assert len(problems(file)) > 0
    # 0.1 to 0.5 s of a quiet core; the array took 1,000 s when every line parsed its statement so far, the tables 60 s
    assert time.process_time() - began < 15


def test_a_hundred_faults_are_enough(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(UNKNOWN)
    *faults, last = problems(file)
    assert len(faults) == 100 and "did you mean train?" in faults[0]
    assert "fix those above first" in last


def numbers(section: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Key]]:
    """Every key of a section class, and of the tables in it, that holds a number."""
    for key in keys(section):
        for member in members(key.type):
            if is_table(member):
                yield from numbers(member, (*path, key.name))
            elif member in (int, float):
                yield ".".join((*path, key.name)), key


@pytest.mark.parametrize("section", [Config, Source, Part, Rest])
def test_every_number_has_a_smallest_and_a_largest_value(section: type) -> None:
    lacking = {name for name, key in numbers(section) if key.high is None or (key.low is None and key.above is None)}
    assert lacking == ({"run.seed"} if section is Config else set())  # any integer of 64 bits


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.norm_eps", "1e-46"),
        ("optim.dense.eps", "1e-46"),
        ("optim.dense.lr", "1e-46"),
        ("optim.weight_decay", "1e-46"),
        ("model.moe.route_scale", "1e39"),
        ("train.z_loss", "1e39"),
        *((f"parallel.{key}", "1e12") for key in ("timeout_s", "capacity")),
        *((f"log.{key}", "1e12") for key in ("telemetry_every_s", "heartbeat_every_s", "alert_timeout_s")),
        *((f"checkpoint.{key}", "1e12") for key in ("minutes", "grace_s")),
        *((f"model.{key}", str(2**62)) for key in ("hidden_size", "intermediate_size", "vocab_size", "max_positions")),
        *((f"model.attention.{key}", str(2**62)) for key in ("num_heads", "kv_lora_rank", "v_head_dim")),
        *((f"model.moe.{key}", str(2**62)) for key in ("num_experts", "intermediate_size", "num_shared_experts")),
        *((f"train.{key}", str(2**62)) for key in ("steps", "sequence_length", "microbatch_size", "loss_chunk")),
        ("train.batch_size", str(2**40)),
        ("model.num_layers", "20_000"),
        ("parallel.ranks", str(2**40)),
    ],
)
def test_numbers_that_nothing_could_use(key: str, value: str) -> None:
    began = time.process_time()
    found = problems(ROOT / "configs" / "quickstart.toml", f"--{key}={value}", valid=True)
    assert any(f"--{key}={value}: {key}: expected " in problem for problem in found), found
    assert time.process_time() - began < 15


def test_experts_over_several_hosts_need_a_transport_between_them() -> None:
    path = ROOT / "configs" / "dsv3.toml"
    load_valid(path, {}, (), to_run=True)
    near = "--parallel.transport=peer"
    with pytest.raises(InputError, match=r"parallel.experts: expected at most the 8 ranks of one host, got 256"):
        load_valid(path, {}, (near,), to_run=True)
    load_valid(path, {}, (near,))
    load_valid(path, {}, (near, "--parallel.experts=8"), to_run=True)
    puts = "--parallel.transport=nvshmem"
    config = load_valid(path, {}, (puts,), to_run=True).config
    assert [each for each in remarks(config) if "no network has carried" in each]
    with pytest.raises(InputError, match=r'transport: expected "peer" or "proxy" when run.device is "cpu", got "nvshm'):
        load_valid(ROOT / "configs" / "quickstart.toml", {}, (puts,))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("key", ["hidden_size", "moe.intermediate_size", "attention.v_head_dim"])
def test_what_kernels_do_not_take_is_wrong_in_the_config(key: str, device: str) -> None:
    found = problems(ROOT / "configs" / "moonlet.toml", f"--model.{key}=130", f"--run.device={device}", valid=True)
    wrong = [problem for problem in found if f": model.{key}: expected a multiple of 8" in problem]
    assert len(wrong) == (device == "cuda" or "attention" not in key)


@pytest.mark.parametrize("text", ["1234567", "007", "2026-11-28", "true", ".001", "1,000", "inf", "[1]", "x", '"x"'])
def test_a_key_of_text_takes_what_the_shell_gives(text: str) -> None:
    path = ROOT / "configs" / "quickstart.toml"
    wanted = text.strip('"')
    assert load(path, {}, (f"--run.root={text}",)).config.run.root == wanted
    assert load(path, {"NMOE_RUN__NAME": text}, ()).config.run.name == wanted


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("optim.dense.lr=.001", "write 0.001"),
        ("optim.dense.lr=1,000.5", "write 1000.5"),
        ("train.steps=1,000", "write 1000"),
        ("train.steps=2026-11-28", "write a whole number without quotes"),
        ("train.graph=yes", "TOML uses true/false"),
    ],
)
def test_remedies_help_where_they_are_read(override: str, remedy: str) -> None:
    (problem,) = problems(ROOT / "configs" / "quickstart.toml", f"--{override}")
    assert problem.endswith(f"; {remedy}"), problem


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("lr = .001", "write a digit before the point"),
        ("steps = 1,000", "write the number without commas, or with _ in their place"),
        ("root = runs", "put text in quotes"),
        ("root = ~/runs", "put text in quotes"),
        ("graph = True", "TOML uses true/false"),
    ],
)
def test_a_line_that_is_no_toml_gets_its_own_remedy(line: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f"[train]\n{line}\n")
    (problem,) = problems(tmp_path / "x.toml")
    assert problem.startswith(f"{tmp_path / 'x.toml'}:2: ") and problem.endswith(f"; {remedy}"), problem


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "quickstart.toml").read_bytes()
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf" + text)
    assert load(tmp_path / "x.toml", {}, ()).config == load(ROOT / "configs" / "quickstart.toml", {}, ()).config
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf\n# caf\xe9\n")
    (problem,) = problems(tmp_path / "x.toml")
    assert problem.startswith(f"{tmp_path / 'x.toml'}:2: expected text in UTF-8, got the byte 0xe9")


@pytest.mark.parametrize(
    "stem",
    ["a" * 240, ".quick", "line\nbreak", "a\u2028b", "\udcff", "", "...", "-x", "mod\u00e8le v2", "quickstart"],
    ids=ascii,
)
def test_a_run_named_by_its_config_obeys_the_rule_for_names(stem: str) -> None:
    assert is_run_name(f"{label(stem)}-20261128-070435")
    assert (label(stem) == stem) == (stem == "quickstart")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--log.alert_command=curl https://hooks.example/T0/secretpath", "--log.alert_command=***"),
        ("--run.name=x", "--run.name=x"),
        ("--train.steps=10", "--train.steps=10"),
        ("--data.source.tokenizer_size=4096", "--data.source.tokenizer_size=4096"),
        ("--schedule.hold_tokens=5", "--schedule.hold_tokens=5"),
        ("--run.root=https://me:pw@host/x", "--run.root=https://***@host/x"),
        ("curl -H 'Authorization: Bearer abc.def'", "curl -H 'Authorization: Bearer ***'"),
        ("WANDB_API_KEY=abc run", "WANDB_API_KEY=*** run"),
        ("hf_abcdefghijkl", "hf_***"),
    ],
)
def test_secrets_are_masked(text: str, expected: str) -> None:
    assert masked(text) == expected


def test_a_secret_in_an_argument_of_its_own_is_masked() -> None:
    assert masked_arguments(("nmoe", "viz", "--token", "abc", "--port", "1")) == (
        "nmoe", "viz", "--token", "***", "--port", "1",
    )  # fmt: skip
    sources = load(ROOT / "configs" / "quickstart.toml", {}, ("--log.alert_command=curl secret",)).sources
    assert sources["log.alert_command"] == "command line --log.alert_command=***"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.dense.optimizer=sgd", 'expected one of "adamw", "muon", got "sgd"; choose one of them'),
        ("model.moe.balance=even", 'expected one of "sign", "quantile", got "even"; choose one of them'),
    ],
)
def test_an_unknown_choice_is_one_line_with_the_known_ones(override: str, message: str) -> None:
    key = override.partition("=")[0]
    found = problems(ROOT / "configs" / "quickstart.toml", f"--{override}")
    assert found == [f"command line --{override}: {key}: {message}"]


def test_plain_torch_on_a_gpu_takes_what_the_kernels_do_not() -> None:
    """Heads of any size; no recorded step, no exchange among GPUs. On a CPU the key changes nothing."""
    on_gpu = ("run.device=cuda", "precision.compute=bf16", "model.attention.v_head_dim=300")
    assert [problem.partition(":")[0] for problem in validate(rules_config(*on_gpu), 1)] == [
        "model.attention.v_head_dim"
    ]
    plain = rules_config(*on_gpu, "run.kernels=torch")
    assert validate(plain, 1) == ()
    assert remarks(plain) == ('run.kernels: "torch" runs every operation of a GPU as plain torch: right, and slow',)
    (problem,) = validate(attrs.evolve(plain, train=attrs.evolve(plain.train, graph=True)), 1)
    assert problem.startswith('train.graph: expected false when run.kernels is "torch", got true; ')
    graphed = rules_config(*on_gpu[:2], "train.graph=true")
    assert validate(graphed, 1) == ()
    (problem,) = validate(attrs.evolve(graphed, parallel=attrs.evolve(plain.parallel, transport="proxy")), 1)
    assert problem.startswith('train.graph: expected false when parallel.transport is "proxy", got true; write false')
    two = attrs.evolve(plain, train=attrs.evolve(plain.train, microbatch_size=8))
    (problem,) = validate(two, 2)
    assert problem.startswith('parallel.experts: expected 1 when run.kernels is "torch", got 2; write 1, ')
    assert validate(attrs.evolve(two, parallel=attrs.evolve(two.parallel, experts=1)), 2) == ()
    assert remarks(rules_config("run.kernels=torch")) == ()


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("--run.device=gpu", 'did you mean "cuda"?'),
        ("--run.device=gpus", 'did you mean "cuda"?'),
        ("--run.device=tpu", "choose one of them"),
        ("--precision.compute=bfloat16", 'did you mean "bf16"?'),
        ("--train.seq_len=8", "did you mean train.sequence_length?"),
        ("--train.batch=8", "did you mean train.batch_size?"),
        ("--train.lr=8", "did you mean optim.dense.lr?"),
        ("--lr.x=8", "did you mean optim.dense.lr?"),
        ("--val.every=8", "did you mean validation?"),
        ("--train.micro_batch_size=8", "did you mean train.microbatch_size?"),
        ("--train.warmup_steps=8", "did you mean schedule.warmup?"),
        ("--input.x=8", "known keys: model, "),
        ("--run.world_size=8", "did you mean parallel.ranks?"),
        ("--train.stesp=8", "did you mean train.steps?"),
    ],
)
def test_suggestions_know_the_words_of_others_and_are_none_where_nothing_is_like(override: str, remedy: str) -> None:
    (problem,) = problems(ROOT / "configs" / "quickstart.toml", override)
    assert problem.rpartition("; ")[2].startswith(remedy), problem
