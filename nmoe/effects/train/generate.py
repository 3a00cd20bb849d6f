"""`nmoe generate`: continue texts with the weights of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from nmoe.config.layers import load_model
from nmoe.config.sections import MOST_TOKENS
from nmoe.config.sections import Model as ModelConfig
from nmoe.effects import files
from nmoe.effects.checkpoint import manifest as manifests
from nmoe.effects.checkpoint import weights
from nmoe.effects.checkpoint.fs import Disk
from nmoe.effects.checkpoint.hf_export import COMPUTE
from nmoe.effects.data.tokenizer import Tokenizer, encoding, load
from nmoe.effects.device import gpu, graph, ops, tape
from nmoe.effects.device.late import read_late
from nmoe.effects.parallel.ranks import SINGLE_RANK, Ranks
from nmoe.effects.record.names import CONFIG
from nmoe.effects.terminal import say, stream
from nmoe.errors import InputError
from nmoe.pure.core import tree
from nmoe.pure.core.key import Key
from nmoe.pure.core.tree import record
from nmoe.pure.data.text import settled
from nmoe.pure.model import decode, model
from nmoe.pure.model.decode import Decoding, Sampling
from nmoe.pure.model.model import Transformer
from nmoe.pure.model.ops import Env, environment

DEFAULT_TOKENS = 128
"""Tokens that are added unless the user says how many, where the model has positions for them."""

BATCH_TOKENS = 8192
"""Tokens of a forward pass that scores texts, as far as one text has fewer."""

PREFILL = 512
"""Tokens of a prompt that are read at once: their scores against all earlier ones exist together."""


@attrs.frozen(kw_only=True, eq=False)
class Network:
    """A trained model on its device."""

    params: Transformer
    router_bias: Tensor
    env: Env
    config: ModelConfig
    vocab_size: int  # ids that the tokenizer knows; the model may have more rows
    ranks: Ranks = SINGLE_RANK  # that compute it together: each calls the same functions with the same arguments
    batch_tokens: int = BATCH_TOKENS
    # For a GPU, of whoever takes the `env` of its kernels as it is:
    single_: Callable[..., tuple[Tensor, Decoding]] | None = None  # `ops.single_`
    greedy: Callable[[Tensor, int, float], Tensor] | None = None  # `ops.greedy`


@torch.inference_mode()
def steps(
    network: Network,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    sampling: Sampling,
    keys: Sequence[Key],
    cached: bool,
) -> Iterator[list[int]]:
    """The next token of every prompt, `num_tokens` times; who wants fewer stops asking.

    prompts  ids, none empty
    keys     of the draws, one a prompt: its text depends on no other prompt
    cached   whether caches keep what earlier tokens gave. Else the model runs again for every token, over the last
             `max_positions` tokens, so that a text may be longer than that
    Raises:  InputError when a logit is not finite; ValueError when caches are asked for and the text is longer than
             `max_positions`, or the kind of attention has none.
    """
    device = network.router_bias.device
    draws = torch.stack([torch.rand(num_tokens, generator=key.generator()) for key in keys], dim=1).to(device)
    chosen = _cached(network, prompts, draws, sampling) if cached else _uncached(network, prompts, draws, sampling)
    for ids in read_late(chosen, device):
        if min(ids) < 0:
            raise InputError(
                "weights: expected finite logits, got some that are not; use the weights of a training that did not "
                "diverge"
            )
        yield ids


def _cached(network: Network, prompts: Sequence[Sequence[int]], draws: Tensor, sampling: Sampling) -> Iterator[Tensor]:
    """The next token of each prompt [B], once a row of `draws` [N B], each from those before.

    The step of a token is recorded and replayed, so that its time is not that of a thousand launches, and on a CPU not
    that of the Python around as many calls.
    """
    p, bias, env, c = network.params, network.router_bias, network.env, network.config
    longest, device = max(map(len, prompts)), bias.device
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    state = decode.begin(p, padding, longest + len(draws) - 1, env, c)  # the last token is not read
    hidden = bias.new_empty(0)
    for part in torch.tensor(rows, device=device).split(PREFILL, dim=1):
        hidden, state = decode.extend(p, part, state, bias, env, c, store=_store_)
    chosen = _pick(network, hidden, draws[0], sampling)
    yield chosen

    replays = network.ranks.world.size == 1
    single_ = network.single_ if len(rows) == 1 else None

    def extended(token: Tensor, state: Decoding) -> tuple[Tensor, Decoding]:
        if single_ is not None:
            return single_(p, token[:, None], state, bias, env, c)
        return decode.extend(p, token.clamp(min=0)[:, None], state, bias, env, c, whole=replays, store=_store_)

    def step(state: Going, draw: Tensor, rates: tuple[()]) -> tuple[Going, Tensor]:
        """One token; the caches, of which each is only in one place, are written in place."""
        hidden, after = extended(state.token, state.decoding())
        tree.map(_copy_, state.caches, after.caches)
        token = _pick(network, hidden, draw, sampling)
        return attrs.evolve(state, place=after.place, length=after.length, token=token), token

    with ExitStack() as scope:
        recorded = graph.replaying(step, scope) if device.type == "cuda" else tape.replaying(step)
        run = recorded if replays else step
        going = Going(state.caches, state.padding, state.place, state.length, state.room, chosen)
        for draw in draws[1:]:
            going, chosen = run(going, draw, ())
            yield chosen


@record
class Going:
    """`Decoding` with the last token: what a step of one token reads and replaces."""

    caches: tuple[Any, ...]
    padding: Tensor
    place: Tensor
    length: int
    room: int
    token: Tensor  # [B] i64, not in the caches yet

    def decoding(self) -> Decoding:
        return Decoding(self.caches, self.padding, self.place, self.length, self.room)


def _store_(cache: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """`cached.stored` in the memory of the cache. Writes: `cache`."""
    return cache.index_copy_(1, place, rows)


def _copy_(path: str, held: Tensor, new: Tensor) -> None:
    """A state of one size into the memory of the one before. Writes: `held`."""
    if new is not held:
        held.copy_(new)


def _uncached(
    network: Network, prompts: Sequence[Sequence[int]], draws: Tensor, sampling: Sampling
) -> Iterator[Tensor]:
    """As `_cached`, by a forward pass over the whole of each text."""
    p, bias, env, c = network.params, network.router_bias, network.env, network.config
    rows = [torch.tensor(prompt, device=bias.device) for prompt in prompts]
    for draw in draws:
        passes = (model.forward(p, row[None, -c.max_positions :], bias, env, c)[0] for row in rows)
        chosen = _pick(network, torch.cat([hidden[:, -1:] for hidden in passes]), draw, sampling)
        yield chosen
        rows = [torch.cat((row, token.clamp(min=0)[None])) for row, token in zip(rows, chosen, strict=True)]


def _pick(network: Network, hidden: Tensor, draw: Tensor, sampling: Sampling) -> Tensor:
    """The token [B] that follows hidden states [B T D]; -1 where a logit is not finite."""
    logits, scale = hidden[:, -1] @ network.params.head, network.config.logit_scale
    if network.greedy is not None and sampling.temperature == 0:
        return network.greedy(logits, network.vocab_size, scale)
    return decode.pick(logits[:, : network.vocab_size].float() * scale, draw, sampling)


def texts(
    network: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    sampling: Sampling,
    key: Key,
    stops: Sequence[str] = (),
    cached: bool = True,
    show: Callable[[int, str], None] = lambda place, piece: None,
) -> list[str]:
    """`continued` of prompts that are texts; an empty one begins at the end of another text."""
    encoder = encoding(tokenizer)
    return continued(
        network,
        tokenizer,
        [encoder.encode_ordinary(prompt) or [tokenizer.end_of_text] for prompt in prompts],
        num_tokens=num_tokens,
        sampling=sampling,
        key=key,
        stops=stops,
        cached=cached,
        show=show,
    )


def continued(
    network: Network,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    sampling: Sampling,
    key: Key,
    stops: Sequence[str] = (),
    cached: bool = True,
    show: Callable[[int, str], None] = lambda place, piece: None,
) -> list[str]:
    """What the model adds to each prompt: up to the end of text, a stop text, or `num_tokens` tokens.

    prompts  ids, none empty
    key      of the draws, folded with the place of the prompt
    show     takes the place of a prompt and a piece of its continuation as soon as no later token can change it
    """
    check_room(network, max(map(len, prompts)), num_tokens, cached)
    piece_of = {rank: token for token, rank in tokenizer.ranks.items()}
    keys = [key.fold(place) for place in range(len(prompts))]
    data, shown, going = [b""] * len(prompts), [""] * len(prompts), set(range(len(prompts)))
    columns = steps(network, prompts, num_tokens=num_tokens, sampling=sampling, keys=keys, cached=cached)
    for count, column in enumerate(columns, 1):
        for place in sorted(going):
            data[place] += piece_of.get(column[place], b"")
            final = count == num_tokens or column[place] == tokenizer.end_of_text
            text, stopped = settled(data[place], stops, final=final)
            show(place, text[len(shown[place]) :])
            shown[place] = text
            if final or stopped:
                going.remove(place)
        if not going:
            break
    return shown


def check_room(network: Network, prompt: int, num_tokens: int, cached: bool) -> None:
    """Refuse what a cache cannot do.

    prompt   tokens of the longest prompt
    Raises:  InputError for a kind of attention without a cache, or more tokens than the model has positions.
    """
    c = network.config
    if not cached:
        return
    if network.env.kind.cache is None:
        raise InputError(
            f"model.attention: expected a kind with a cache, got {type(c.attention).__name__}; --no-cache reads the "
            "whole text again for every token"
        )
    if prompt + num_tokens > c.max_positions + 1:  # the last token is not read
        raise InputError(
            f"--tokens: expected at most {max(c.max_positions + 1 - prompt, 0)} after a prompt of {prompt}, because "
            f"model.max_positions is {c.max_positions}, got {num_tokens}; ask for fewer, or pass --no-cache to "
            "continue with the last positions alone"
        )


def open_network(folder: Path, device: str | None, checkpoint: Path | None = None) -> tuple[Network, Tokenizer]:
    """The weights and tokenizer of a run, or of what `nmoe import hf` wrote.

    device      "cuda", "cpu", or None: the GPU if torch finds one. A model in bf16 runs by the kernels there, one in
                fp32, for which there are none, by plain torch
    checkpoint  of the run, to read in the place of its weights file
    Raises:     InputError when there are none, or the device cannot run them.
    """
    if not files.is_file(folder / CONFIG):
        raise InputError(f"{folder}: expected config.toml of a run, got none; `nmoe runs list` shows the runs")
    c, precision = load_model(folder / CONFIG)
    tokenizer = load(folder)
    if tokenizer.size > c.vocab_size:
        raise InputError(
            f"{folder}: expected a tokenizer of at most model.vocab_size = {c.vocab_size} ids, got {tokenizer.size}; "
            "restore its tokenizer.json"
        )
    plain = precision.compute == "fp32"
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = gpu.device(name, kernels="torch" if plain else "triton")
    specs = model.specs(c)
    formats = weights.formats_of(specs, model.dims(c), COMPUTE[precision.storage()])
    if checkpoint is None:
        params, router_bias = weights.read(folder, specs, formats)
    else:
        stored = weights.of_checkpoint(Disk(), checkpoint, manifests.read(Disk(), checkpoint), specs, formats)
        params, router_bias = stored.params, stored.router_bias
    env = environment(c, c.max_positions, None if plain and where.type == "cuda" else ops.build(where, c))
    params, router_bias, tables = tree.map(lambda _, leaf: leaf.to(where), (params, router_bias, env.tables))
    network = Network(
        params=params,
        router_bias=router_bias,
        env=attrs.evolve(env, tables=tables),
        config=model.model_at(c, env, MOST_TOKENS),  # in the last stage of its attention
        vocab_size=tokenizer.size,
        single_=None if plain else ops.single_(where, c),
        greedy=None if plain else ops.greedy(where),
    )
    return network, tokenizer


def main(
    folder: Path,
    prompts: Sequence[str],
    *,
    num_tokens: int | None = None,
    sampling: Sampling,
    seed: int = 0,
    stops: Sequence[str] = (),
    device: str | None = None,
    cached: bool = True,
) -> int:
    """Print each prompt and its continuation: a single one as it comes, several in their order, whole.

    folder      of a run, or of one of its checkpoints
    num_tokens  None: `DEFAULT_TOKENS`, or as many as the model has positions for
    """
    _check(num_tokens, sampling, stops)
    checkpoint = manifests.find(folder)
    network, tokenizer = open_network(checkpoint.parent.parent if checkpoint else folder, device, checkpoint)
    encoder = encoding(tokenizer)
    longest = max(len(encoder.encode_ordinary(prompt)) or 1 for prompt in prompts)
    room = network.config.max_positions + 1 - longest if cached else DEFAULT_TOKENS
    single = len(prompts) == 1
    if single:
        stream(prompts[0])
    added = texts(
        network,
        tokenizer,
        prompts,
        num_tokens=max(1, min(DEFAULT_TOKENS, room)) if num_tokens is None else num_tokens,
        sampling=sampling,
        key=Key(seed).fold("sample"),
        stops=stops,
        cached=cached,
        show=(lambda _, piece: stream(piece)) if single else lambda _, piece: None,
    )
    if single:
        say("")
    else:
        for place, (prompt, text) in enumerate(zip(prompts, added, strict=True), 1):
            say(f"[{place}/{len(prompts)}]\n{prompt}{text}")
    return 0


def _check(num_tokens: int | None, sampling: Sampling, stops: Sequence[str]) -> None:
    """Refuse numbers that give no text. Raises: InputError with each of them."""
    problems: list[str] = []
    if num_tokens is not None and num_tokens < 1:
        problems.append(f"--tokens: expected at least 1, got {num_tokens}; ask for more")
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    if temperature and not 1e-4 <= temperature <= 1e4:  # logits / 1e-40 is infinite in fp32
        problems.append(
            f"--temperature: expected 0 or a number from 1e-4 to 1e4, got {temperature}; 0 takes the most likely token"
        )
    if top_k is not None and top_k < 1:
        problems.append(f"--top-k: expected at least 1, got {top_k}; leave it out to draw among all tokens")
    if not 0 < top_p <= 1:
        problems.append(f"--top-p: expected above 0 and at most 1, got {top_p}; leave it out to draw among all tokens")
    if "" in stops:
        problems.append("--stop: expected a text, got an empty one; leave it out to stop at the end of text alone")
    if problems:
        raise InputError(*problems)
