"""Every config that is shipped, and every way to get one of its keys wrong."""

from __future__ import annotations

import copy
import json
import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import tomli
import tomli_w
import torch
from jsonschema import Draft202012Validator
from transformers import DeepseekV32Config

from nmoe.config import Config, diff, dump, load, load_valid, schema
from nmoe.config.check import unrunnable
from nmoe.config.sections import Dsa, Gqa, Mla
from nmoe.pure.core import tree
from nmoe.pure.core.blueprint import count
from nmoe.pure.cost.plan import plan
from nmoe.pure.model import hf, model
from nmoe.pure.model.attention import kind_of, mla
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.hf import settings
from nmoe.pure.model.ops import environment
from tests import kimi_linear
from tests.configs import ROOT, at_line, problems
from tests.gpt_oss import hf_settings

SHIPPED = sorted([*(ROOT / "configs").glob("*.toml"), *(ROOT / "configs" / "examples").glob("*.toml")])
NAMES = [path.stem for path in SHIPPED]
Where = tuple[str, ...]


def every(tables: dict[str, Any], path: Where = ()) -> Iterator[tuple[Where, Any]]:
    """All keys of nested tables, tables included."""
    for name, value in tables.items():
        yield (*path, name), value
        if isinstance(value, dict):
            yield from every(value, (*path, name))


def at(tables: dict[str, Any], path: Where) -> dict[str, Any]:
    """The table that holds the last name of a path."""
    for name in path[:-1]:
        tables = tables[name]
    return tables


def written(folder: Path, tables: dict[str, Any]) -> Path:
    """A file with these tables, and its base beside it if it extends one."""
    if isinstance(base := tables.get("extends"), str):
        (folder / base).write_text((ROOT / "configs" / base).read_text())
    path = folder / "mutated.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def complete(path: Path) -> dict[str, Any]:
    """The tables of a config with every key it can have a value for."""
    return tomli.loads(dump(load(path, {}, ()).config))


def in_groups(tables: dict[str, Any]) -> list[list[Where]]:
    """All keys, those of one group so that each can be wrong without hiding another: values, kinds, tables by depth."""
    groups: dict[Any, list[Where]] = {}
    for where, value in every(tables):
        if where != ("extends",):
            group = len(where) if isinstance(value, dict) else (where[-1] == "kind") * len(where)
            groups.setdefault(("table" if isinstance(value, dict) else "value", group), []).append(where)
    return list(groups.values())


def described(root: dict[str, Any], section: dict[str, Any], tables: dict[str, Any], path: Where = ()) -> Any:
    """What a schema says of each value in nested tables."""
    for name, value in tables.items():
        about = section["properties"][name]
        if isinstance(value, dict):
            inner = [root["$defs"][each["$ref"].rpartition("/")[2]] for each in about.get("anyOf", [about])]
            kind = {"const": value.get("kind")}
            (one,) = [
                each
                for each in inner
                if value.keys() <= each["properties"].keys()
                and each["properties"].get("kind", kind)["const"] == kind["const"]
            ]
            yield from described(root, one, value, (*path, name))
        else:
            yield (*path, name), about


def required(section: type, table: Mapping[str, Any], path: Where = ()) -> Iterator[Where]:
    """Keys without a default, of the tables there are and of their kinds."""
    hints = typing.get_type_hints(section)
    for field in attrs.fields(section):
        inner, where = table.get(field.name), (*path, field.name)
        if field.default is attrs.NOTHING:
            yield where
        for member in typing.get_args(hints[field.name]) or (hints[field.name],):
            if attrs.has(member) and isinstance(inner, dict) and getattr(member, "kind", None) == inner.get("kind"):
                yield from required(member, inner, where)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_valid(path, {}, ()).config
    assert unrunnable(config, config.parallel.ranks) == ()
    if path.stem in ("dsv2", "dsv3", "deepseek-v3.2"):  # experts over several hosts
        near = attrs.evolve(config, parallel=attrs.evolve(config.parallel, transport="peer"))
        (refused,) = unrunnable(near, config.parallel.ranks)
        assert refused.startswith("parallel.experts: expected at most the 8 ranks of one host") and "=proxy" in refused
    tables = tomli.loads(path.read_text())
    assert [error.message for error in Draft202012Validator(schema()).iter_errors(tables)] == []


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_every_mistyped_key_is_named(path: Path, tmp_path: Path) -> None:
    tables = tomli.loads(path.read_text())
    for mistyped in in_groups(tables):
        if mistyped[0][-1] == "kind":  # mistyped, it is missing
            continue
        wrong = copy.deepcopy(tables)
        for where in mistyped:
            table = at(wrong, where)
            table[f"{where[-1]}x"] = table.pop(where[-1])
        found = problems(written(tmp_path, wrong))
        for where in mistyped:
            (told,) = [problem for problem in found if f": {'.'.join(where)}x: " in problem]
            # a letter with another behind it is like nothing
            remedy = (
                f"did you mean {'.'.join(where)}?" if len(where[-1]) > 1 else "known keys: kind, pattern, last, a, b, c"
            )
            assert told.endswith(f"; {remedy}"), told
            assert f"{where[-1]}x" in at_line(told, tmp_path / "mutated.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
@pytest.mark.parametrize("wrong", [True, "text", 3, 2.5, [], {"inner": 1}], ids=repr)
def test_every_value_of_a_wrong_type_is_named(path: Path, wrong: Any, tmp_path: Path) -> None:
    tables = tomli.loads(path.read_text())

    def fits(where: Where) -> bool:
        right = at(tables, where)[where[-1]]
        if isinstance(right, str):
            return isinstance(wrong, str) and where[-1] in ("path", "pattern", "last")
        return type(wrong) is type(right) or (type(wrong) is int and type(right) is float)

    for group in in_groups(tables):
        places = [where for where in group if not fits(where)]
        mutated = copy.deepcopy(tables)
        for where in places:
            at(mutated, where)[where[-1]] = wrong
        found = problems(written(tmp_path, mutated))
        for where in places:
            (told,) = [problem for problem in found if f": {'.'.join(where)}: " in problem]
            assert where[-1] in at_line(told, tmp_path / "mutated.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_every_missing_key_is_named(path: Path, tmp_path: Path) -> None:
    tables = complete(path)
    needed = {*required(Config, tables), *(where for where, _ in every(tables) if where[-1] == "kind")}
    for places in in_groups(tables):
        mutated = copy.deepcopy(tables)
        for where in places:
            del at(mutated, where)[where[-1]]
        found = problems(written(tmp_path, mutated))
        named = [problem.split(": ")[1] for problem in found]
        assert sorted(named) == sorted(".".join(where) for where in places if where in needed), found
    assert len(needed & {where for where, _ in every(tables)}) >= 38


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_the_schema_refuses_what_loading_refuses(path: Path) -> None:
    """Each key mistyped, of another type, and left out: by itself, for editors mark each."""
    schema_of = Draft202012Validator(schema())
    tables = complete(path)
    needed = {*required(Config, tables), *(where for where, _ in every(tables) if where[-1] == "kind")}
    for where, right in every(tables):
        wrongs: list[Any] = [True, [], {"inner": 1}, 2.5, "text"]
        for wrong in [each for each in wrongs if type(each) is not type(right) or isinstance(right, dict)]:
            mutated = copy.deepcopy(tables)
            at(mutated, where)[where[-1]] = wrong
            assert not schema_of.is_valid(mutated), (where, wrong)
        left_out, mistyped = copy.deepcopy(tables), copy.deepcopy(tables)
        del at(left_out, where)[where[-1]]
        assert schema_of.is_valid(left_out) == (where not in needed), where
        at(mistyped, where)[f"{where[-1]}x"] = right
        assert not schema_of.is_valid(mistyped), where
        # what a file that extends another leaves out may stand in the other
        assert schema_of.is_valid({"extends": "other.toml", **left_out}), where
        assert not schema_of.is_valid({"extends": "other.toml", **mistyped}), where


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
@pytest.mark.parametrize(("bound", "beyond"), [("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1)])
def test_bounds_are_checked_and_in_the_schema(path: Path, bound: str, beyond: int, tmp_path: Path) -> None:
    """Out of the schema's bounds, validate refuses the values too, all at once, each by name and line."""
    tables = complete(path)
    tried: list[Where] = []
    for where, about in list(described(schema(), schema(), tables)):
        if bound in about:
            table = at(tables, where)
            value = about[bound] + beyond * max(1, abs(about[bound]) if isinstance(table[where[-1]], float) else 1)
            table[where[-1]] = type(table[where[-1]])(value)
            tried.append(where)
    assert tried
    found = problems(written(tmp_path, tables), valid=True)
    for where in tried:
        told = [text for text in found if f": {'.'.join(where)}: " in text]
        assert told and where[-1] in at_line(told[0], tmp_path / "mutated.toml"), where
    marked = {tuple(error.absolute_path) for error in Draft202012Validator(schema()).iter_errors(tables)}
    unions = (("data", "source"), ("model", "attention"))  # of a union, the whole table
    assert marked == {where[:2] if where[:2] in unions else where for where in tried}


def test_committed_schema_is_the_generated_one() -> None:
    Draft202012Validator.check_schema(schema())
    assert (ROOT / "configs" / "nmoe.schema.json").read_text() == json.dumps(schema(), indent=2) + "\n"


def test_moonlet_16b_is_moonlet_with_more_layers() -> None:
    small, large = (load(ROOT / "configs" / f"{name}.toml", {}, ()).config for name in ("moonlet", "moonlet-16b"))
    assert [each.path for each in diff(small, large) if each.path.startswith("model")] == ["model.num_layers"]


def test_kimi_linear_has_the_published_shape() -> None:
    """The values of config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct, and the size its name says."""
    config = load(ROOT / "configs" / "kimi-linear-48b.toml", {}, ()).config
    c, blueprint = config.model, make_blueprint(config, 64, 8)
    published = {
        **{"vocab_size": 163840, "hidden_size": 2304, "num_hidden_layers": 27, "intermediate_size": 9216},
        **{"moe_intermediate_size": 1024, "num_experts": 256, "num_experts_per_token": 8, "num_shared_experts": 1},
        **{"num_expert_group": 1, "topk_group": 1, "moe_renormalize": True, "routed_scaling_factor": 2.446},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "q_lora_rank": None, "kv_lora_rank": 512},
        **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-5},
        **{"linear_num_heads": 32, "linear_head_dim": 128, "linear_conv_kernel_dim": 4},
    }
    found = kimi_linear.hf_settings(c)
    assert {key: found[key] for key in published} == published
    full = [at for at, kind in enumerate(found["layer_types"], 1) if kind == "full_attention"]
    assert full == [4, 8, 12, 16, 20, 24, 27]
    assert found["mlp_layer_types"] == ["dense"] + ["sparse"] * 26
    assert 48e9 < blueprint.parameters.total < 49.2e9
    assert 3.0e9 < blueprint.parameters.active - blueprint.parameters.embedding < 3.2e9
    with torch.device("meta"):
        p = tree.map(lambda _, spec: torch.empty(spec.shape(blueprint.dims)), blueprint.specs)
        env = environment(c, 256)
        hidden, _ = model.forward(p, torch.zeros(1, 256, dtype=torch.int64), torch.empty(26, 256), env, c)
    assert hidden.shape == (1, 256, 2304)
    planned = plan(config, blueprint, mfu=0.4)
    assert planned.memory.total() < 141e9
    assert planned.flops.attention < planned.flops_executed.attention


def test_gpt_oss_has_the_published_shape() -> None:
    """The values of config.json of openai/gpt-oss-20b that this model has, under the names of `transformers`."""
    c = load(ROOT / "configs" / "gpt-oss-20b.toml", {}, ()).config.model
    kind, specs, sizes = kind_of(c.attention), model.specs(c), model.dims(c)
    assert isinstance(c.attention, Gqa)
    found = hf_settings(c.attention)
    published = {
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
            "attention_factor": pytest.approx(0.1 * math.log(32) + 1),  # theirs where the key is absent
        },
    }
    assert {name: found[name] for name in published} == published
    assert [kind.at_layer(c.attention, layer).window for layer in range(24)] == [128, None] * 12
    assert (c.num_layers, c.hidden_size, c.vocab_size, c.max_positions) == (24, 2880, 201088, 131072)
    assert (c.moe.num_experts, c.moe.top_k, c.moe.intermediate_size) == (32, 4, 2880)
    assert found["attention_bias"] is True
    theirs = hf.settings(c)
    assert (theirs["swiglu_limit"], theirs["swiglu_alpha"], theirs["model_type"]) == (7.0, 1.702, "gpt_oss")
    # published (model card, table 1: 20.91 B and 3.61 B, the active ones without the embedding)
    counted = count(specs, sizes, top_k=4)
    assert counted.total == 20_914_757_184
    assert 3.60e9 < counted.active - counted.embedding < 3.62e9


def test_deepseek_v32_has_the_published_shape() -> None:
    """The defaults of `transformers.DeepseekV32Config`, which are config.json of deepseek-ai/DeepSeek-V3.2-Exp."""
    c = load(ROOT / "configs" / "deepseek-v3.2.toml", {}, ()).config.model
    assert isinstance(c.attention, Dsa)
    indexer = {
        "index_topk": c.attention.index_top_k,
        "index_n_heads": c.attention.index_num_heads,
        "index_head_dim": c.attention.index_head_dim,
    }
    found = (
        mla.hf_settings(c.attention)
        | indexer
        | {
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "num_hidden_layers": c.num_layers,
            "first_k_dense_replace": c.num_dense_layers,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_positions,
            "n_routed_experts": c.moe.num_experts,
            "num_experts_per_tok": c.moe.top_k,
            "n_shared_experts": c.moe.num_shared_experts,
            "moe_intermediate_size": c.moe.intermediate_size,
            "n_group": c.moe.num_groups,
            "topk_group": c.moe.top_k_groups,
            "routed_scaling_factor": c.moe.route_scale,
        }
    )
    published = DeepseekV32Config()
    theirs = {name: getattr(published, name) for name in found if not name.startswith("rope_")}
    assert {name: found[name] for name in theirs} == theirs
    # 671 B and an indexer in each of 61 layers
    indexers = 61 * (1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64)
    dense = attrs.evolve(c, attention=Mla(**{f.name: getattr(c.attention, f.name) for f in attrs.fields(Mla)}))
    totals = [count(model.specs(each), model.dims(each), top_k=8).total for each in (c, dense)]
    assert totals[0] - totals[1] == indexers


def test_moonlight_is_the_published_model() -> None:
    """The values of config.json of moonshotai/Moonlight-16B-A3B, under the names of `transformers`."""
    found = settings(load(ROOT / "configs" / "moonlight.toml", {}, ()).config.model)
    published = {
        "vocab_size": 163840,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "intermediate_size": 11264,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
    }
    assert {name: found.get(name, "absent") for name in published} == published
