"""`nmoe generate`: the same text with caches and without, alone and beside others; its end; what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nmoe.cli import main
from nmoe.config import sections
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.device import tape
from nmoe.effects.record.names import WEIGHTS
from nmoe.effects.train import generate
from nmoe.errors import InputError, printable
from nmoe.pure.core.key import Key
from nmoe.pure.model import decode
from nmoe.pure.model.decode import Sampling
from tests import shapes
from tests.effects.checkpoint.hf_models import write
from tests.effects.train.tiny import ATTENTIONS

GQA = sections.Gqa(num_heads=4, num_kv_heads=2, head_dim=8, window=6, global_every=2, sinks=True)
MOE = shapes.mixture(intermediate_size=8)  # torch's grouped product takes rows of 16 bytes
MODELS = {
    "mla": shapes.config(vocab_size=300, moe=MOE, attention=shapes.attention(q_lora_rank=7), embedding_scale=3.0),
    "gqa": shapes.config(vocab_size=300, moe=MOE, attention=GQA),
    "kda, nsa, dsa": shapes.config(vocab_size=300, moe=MOE, attention=ATTENTIONS["kda, nsa, dsa"]),
}
HOW = (Sampling(), Sampling(temperature=1.5), Sampling(temperature=1, top_k=9, top_p=0.8))
PROMPTS = ("def main(", "x", "import os\nimport sys\n")


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of 300, as a run leaves them."""
    made = tmp_path_factory.mktemp("generate") / "run"
    write(made, MODELS[request.param])
    shutil.copy(sources / tokenizers.FILE, made)
    return made


def texts(folder: Path, prompts: tuple[str, ...] = PROMPTS, seed: int = 0, **settings: Any) -> list[str]:
    network, tokenizer = generate.open_network(folder, "cpu")
    settings = {"num_tokens": 30, "sampling": Sampling(temperature=1.5), "key": Key(seed)} | settings
    return generate.texts(network, tokenizer, prompts, **settings)


@pytest.mark.parametrize("sampling", HOW)
def test_a_cache_changes_no_text(folder: Path, sampling: Sampling) -> None:
    """In fp32, by the ops of the CPU; longer than the window and, without a cache, prompt by prompt."""
    cached = texts(folder, sampling=sampling)
    assert cached == texts(folder, sampling=sampling, cached=False)
    assert len(set(cached)) == len(PROMPTS) and all(cached)


def test_a_text_depends_on_no_other_prompt(folder: Path) -> None:
    together = texts(folder)
    assert texts(folder, PROMPTS[:1]) == together[:1]
    assert texts(folder, (PROMPTS[0], "another")) != together[:2]
    assert texts(folder, (PROMPTS[0], "another"))[0] == together[0]
    assert len(set(texts(folder, PROMPTS[:1] * 3))) == 3, "each has draws of its own"


def test_the_seed_decides(folder: Path) -> None:
    assert texts(folder, seed=1) == texts(folder, seed=1) != texts(folder, seed=2)


def test_the_scale_of_the_logits_is_that_of_the_model(sources: Path, tmp_path: Path) -> None:
    """Half of the logits are drawn at half of the temperature as all of them at the whole."""
    for name, scale in (("whole", 1.0), ("half", 0.5)):
        write(tmp_path / name, attrs.evolve(MODELS["mla"], logit_scale=scale))
        shutil.copy(sources / tokenizers.FILE, tmp_path / name)
    whole = texts(tmp_path / "whole")
    assert texts(tmp_path / "half", sampling=Sampling(temperature=0.75)) == whole
    assert texts(tmp_path / "half") != whole


def test_a_prompt_is_read_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = texts(folder)
    monkeypatch.setattr(generate, "PREFILL", 3)
    assert texts(folder) == whole


def test_a_text_ends_before_a_stop_text(folder: Path) -> None:
    (text,) = texts(folder, PROMPTS[:1])
    stop = text[7:9]
    assert texts(folder, PROMPTS[:1], stops=("never there", stop)) == [text[: text.index(stop)]]


def test_one_prompt_may_end_before_the_others(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two end by a stop text and the end of text, the third goes on; what is shown are parts of each text."""
    write(tmp_path / "run", MODELS["mla"])
    shutil.copy(sources / tokenizers.FILE, tmp_path / "run")
    end = tokenizers.load(tmp_path / "run").end_of_text
    columns = [[97, 98, 0xC3], [end, 59, 0xA4], [97, 97, 99], [97, 97, 100], [97, 97, 101]]
    asked: list[int] = []

    def scripted(*_: Any, **__: Any) -> Iterator[list[int]]:
        for place, column in enumerate(columns):
            asked.append(place)
            yield column

    monkeypatch.setattr(generate, "steps", scripted)
    pieces: list[tuple[int, str]] = []
    took: dict[str, Any] = {"num_tokens": 4, "stops": (";", "cx")}
    assert texts(tmp_path / "run", **took, show=lambda *piece: pieces.append(piece)) == ["a", "b", "äcd"]
    for place, text in enumerate(("a", "b", "äcd")):
        assert "".join(piece for at, piece in pieces if at == place) == text
    assert asked == [0, 1, 2, 3]
    columns[:] = [[97, 97, 97], [end, end, end], [98, 98, 98]]
    asked.clear()
    assert texts(tmp_path / "run") == ["a", "a", "a"] and asked == [0, 1], "nobody goes on"


def test_a_kind_without_a_cache_is_refused_by_name(folder: Path) -> None:
    network, tokenizer = generate.open_network(folder, "cpu")
    kind = attrs.evolve(network.env.kind, cache=None)
    network = attrs.evolve(network, env=attrs.evolve(network.env, kind=kind))
    settings: dict[str, Any] = {"num_tokens": 3, "sampling": Sampling(), "key": Key(0)}
    with pytest.raises(InputError, match="model.attention: expected a kind with a cache, got .*; --no-cache reads"):
        generate.texts(network, tokenizer, ["x"], **settings)
    assert generate.texts(network, tokenizer, ["x"], cached=False, **settings) == texts(folder, ("x",), **settings)


def run(*arguments: object) -> int:
    return main(["generate", *(str(argument) for argument in arguments)])


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One prompt streams, several have numbers; by default as many tokens as the model has positions for."""
    (one,) = texts(folder, PROMPTS[:1], key=Key(3).fold("sample"), sampling=Sampling(temperature=0.7), num_tokens=5)
    settings = ("--seed=3", "--tokens=5", "--device=cpu")
    assert run(folder, "--prompt", PROMPTS[0], *settings) == 0
    one = "\t".join("\n".join(map(printable, part.split("\n"))) for part in one.split("\t"))
    assert capsys.readouterr().out == f"{PROMPTS[0]}{one}\n"
    assert run(folder, "--prompt", PROMPTS[0], "--prompt", "x", *settings) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"[1/2]\n{PROMPTS[0]}{one}\n[2/2]\nx")
    assert run(folder, "--prompt", "x", "--device=cpu") == 0
    assert run(folder, "--prompt", "x", "--device=cpu", "--no-cache", "--tokens=70") == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--tokens=0",), "--tokens: expected at least 1, got 0"),
        (
            ("--tokens=65",),
            "--tokens: expected at most 64 after a prompt of 1, because model.max_positions is 64",
        ),
        (("--top-k=0",), "--top-k: expected at least 1, got 0"),
        (("--top-p=0",), "--top-p: expected above 0 and at most 1, got 0.0"),
        (("--top-p=nan",), "--top-p: expected above 0 and at most 1, got nan"),
        (("--temperature=-1",), "--temperature: expected 0 or a number from 1e-4 to 1e4, got -1.0"),
        (("--temperature=nan",), "--temperature: expected 0 or a number from 1e-4 to 1e4, got nan"),
        (("--stop=",), "--stop: expected a text, got an empty one"),
        (("--device=tpu",), "--device: invalid choice"),
    ],
    ids=str,
)
def test_what_gives_no_text_is_refused(
    folder: Path, arguments: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--prompt", "x", "--device=cpu", *arguments) == 2
    assert problem in capsys.readouterr().err


def test_a_run_without_weights_names_its_checkpoints(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an interrupted attempt had left is among the attempts, and weights of an earlier step are never taken."""
    run_folder = tmp_path / "run"
    shutil.copytree(folder, run_folder)
    (run_folder / "attempts" / "1").mkdir(parents=True)
    (run_folder / WEIGHTS).rename(run_folder / "attempts" / "1" / WEIGHTS)
    assert run(run_folder, "--prompt", "x", "--device=cpu") == 2
    said = capsys.readouterr().err
    assert "got no such file" in said and f"name one of its checkpoints: `nmoe ckpt list {run_folder}`" in said


def test_a_model_smaller_than_its_tokenizer_is_refused(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "run", shapes.config(vocab_size=299))
    shutil.copy(sources / tokenizers.FILE, tmp_path / "run")
    assert run(tmp_path / "run", "--prompt", "x") == 2
    assert "expected a tokenizer of at most model.vocab_size = 299 ids, got 300" in capsys.readouterr().err


@pytest.mark.parametrize("sampling", HOW[:2])
def test_kernels_of_one_row_take_the_tokens_of_one_prompt(
    folder: Path, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stubs that compute as ever: what a GPU brings along is asked where it fits, and nowhere else."""
    called: list[str] = []

    def single_(p: Any, tokens: Tensor, state: Any, *given: Any) -> Any:
        called.append("single_")
        store = lambda cache, rows, place: cache.index_copy_(1, place, rows)  # noqa: E731
        return decode.extend(p, tokens.clamp(min=0), state, *given, store=store)

    def greedy(logits: Tensor, vocab: int, scale: float) -> Tensor:
        called.append("greedy")
        return decode.pick(logits[:, :vocab].float() * scale, torch.zeros(len(logits)), Sampling())

    monkeypatch.setattr(tape, "replaying", lambda step: step)
    network, tokenizer = generate.open_network(folder, "cpu")
    assert network.single_ is None and network.greedy is None
    network = attrs.evolve(network, single_=single_, greedy=greedy)
    settings: dict[str, Any] = {"num_tokens": 5, "sampling": sampling, "key": Key(0)}
    for count in (1, 2):
        called.clear()
        found = generate.texts(network, tokenizer, PROMPTS[:count], **settings)
        assert found == texts(folder, PROMPTS[:count], **settings)
        assert called.count("single_") == (4 if count == 1 else 0)
        assert called.count("greedy") == (5 if sampling.temperature == 0 else 0)
