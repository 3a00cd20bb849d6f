"""What a checkpoint of another run is told, key by key."""

from __future__ import annotations

import json
from typing import Any

import attrs

from nmoe.config import Config
from nmoe.config import sections as s
from nmoe.config.convert import structure
from nmoe.config.fields import table, walk
from nmoe.effects.train.identity import Identity, accepted, values
from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.model import model
from tests.effects.train.tiny import tiny


def of(config: Config, tokenizer: str = "a" * 64, data: str = "b" * 64) -> Identity:
    return Identity(config=config, tokenizer=tokenizer, data=data)


def stored(identity: Identity) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(values(identity)))


def problems(stored: dict[str, Any], identity: Identity, *accept: str) -> tuple[str, ...]:
    try:
        accepted("step-7", stored, identity, accept)
    except InputError as error:
        return error.problems
    return ()


BASE = tiny(q_lora_rank=12)


def test_run_fields_may_change_and_the_rest_may_not() -> None:
    kept = stored(of(BASE))
    free = attrs.evolve(
        BASE,
        train=attrs.evolve(BASE.train, steps=99, microbatch_size=1, resume="x"),
        run=attrs.evolve(BASE.run, root="elsewhere", name="x"),
        parallel=s.Parallel(ranks=2),
        checkpoint=s.Checkpoint(every=3),
        validation=s.Validation(every=1, tokens=64),
    )
    assert accepted("step-7", kept, of(free), ()) == ()
    other = attrs.evolve(
        BASE,
        model=attrs.evolve(BASE.model, attention=attrs.evolve(BASE.model.attention, q_lora_rank=None)),
        optim=attrs.evolve(BASE.optim, clip_norm=2.0),
        run=attrs.evolve(BASE.run, seed=1),
    )
    told = problems(kept, of(other, tokenizer="c" * 64, data="d" * 64))
    assert [line.partition(":")[0] for line in told] == [
        "optim.clip_norm",
        "run.seed",
        "model.attention.q_lora_rank",
        "tokenizer.identity",
        "data.identity",
    ]
    assert told[0] == (
        "optim.clip_norm: expected 1.0 as in step-7, got 2.0; set it back, train under another run.name, or add "
        "--accept optim.clip_norm to resume all the same"
    )
    assert "q_lora_rank: expected 12 as in step-7, got nothing; " in told[2]


def test_what_is_accepted_is_told_and_nothing_else_is() -> None:
    other = of(attrs.evolve(BASE, optim=attrs.evolve(BASE.optim, clip_norm=2.0)), tokenizer="c" * 64)
    kept = stored(of(BASE))
    assert [line.partition(":")[0] for line in problems(kept, other, "optim.clip_norm")] == ["tokenizer.identity"]
    differences = accepted("step-7", kept, other, ("optim.clip_norm", "tokenizer.identity"))
    assert [(each.path, each.left, each.right) for each in differences] == [
        ("optim.clip_norm", 1.0, 2.0),
        ("tokenizer.identity", "a" * 64, "c" * 64),
    ]
    assert accepted("step-7", stored(other), other, ("optim.clip_norm",)) == (), "the same command again"
    assert problems(kept, of(BASE), "optim.clip_nrm") == (
        "--accept: expected a key that a resume has to accept, got optim.clip_nrm; did you mean optim.clip_norm?",
    )


def test_a_key_that_was_not_known_then_has_its_default() -> None:
    kept = stored(of(BASE))
    del kept["model.moe.route_scale"], kept["data.identity"]
    assert [line.partition(":")[0] for line in problems(kept, of(BASE))] == ["data.identity"]
    scaled = attrs.evolve(BASE.model, moe=attrs.evolve(BASE.model.moe, route_scale=2.0))
    told = problems(kept, of(attrs.evolve(BASE, model=scaled)), "data.identity")
    assert told[0].startswith("model.moe.route_scale: expected nothing as in step-7, got 2.0; ")
    assert problems({**kept, "model.gone": 3}, of(BASE), "data.identity")[0].startswith(
        "model.gone: expected 3 as in step-7, got n"
    )


def test_no_remedy_that_cannot_work_is_offered() -> None:
    """Every key that the tensors of a checkpoint depend on, and none else, is refused whether accepted or not."""
    kept = stored(of(BASE))
    size = attrs.evolve(BASE, model=attrs.evolve(BASE.model, hidden_size=64, norm_eps=1e-5))
    expected = "model.hidden_size: expected 32 as in step-7, got 64; set it back, or train under another run.name"
    assert problems(kept, of(size))[0] == expected
    assert problems(kept, of(size), "model.hidden_size", "model.norm_eps") == (expected,)
    for path, key, value in walk(BASE):
        if not isinstance(value, bool) and isinstance(value, int) and path[0] == "model":
            model = structure(changed_table(BASE, path, value + 2), s.Config)
            assert isinstance(model, s.Config), path
            same = shapes(BASE) == shapes(model)
            assert same != key.shapes, path


def changed_table(config: Config, path: tuple[str, ...], value: int) -> dict[str, Any]:
    tables = table(config)
    inner = tables
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return tables


def shapes(config: Config) -> Any:
    """Path and shape of every tensor."""
    specs, dims = model.specs(config.model), model.dims(config.model)
    return [(path, spec.shape(dims)) for path, spec in tree.leaves(specs)]


def test_more_steps_move_a_schedule_in_shares() -> None:
    """The identity of such a run holds its lengths in tokens, so another length of the run is another schedule."""
    shares = attrs.evolve(BASE, schedule=s.Schedule(warmup=0.1, decay=0.5))
    kept = stored(of(shares))
    assert accepted("step-7", kept, of(shares), ()) == ()
    longer = of(attrs.evolve(shares, train=attrs.evolve(BASE.train, steps=2 * BASE.train.steps)))
    told = problems(kept, longer)
    assert [line.partition(":")[0] for line in told] == [
        f"schedule.{part}_tokens" for part in ("warmup", "hold", "decay")
    ]
    assert told[2] == (
        "schedule.decay_tokens: expected 160 as in step-7, got 320; set train.steps back, the schedule is in shares of "
        "the run, train under another run.name, or add --accept schedule.decay_tokens to resume all the same"
    )
    accept = tuple(f"schedule.{part}_tokens" for part in ("warmup", "hold", "decay"))
    assert len(accepted("step-7", kept, longer, accept)) == 3
