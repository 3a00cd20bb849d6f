"""What a task may ask of a model: the cost of a continuation, and a continuation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import torch

from nmoe.effects.data.tokenizer import Tokenizer, encode, encoding
from nmoe.effects.parallel.ranks import all_reduce_sum
from nmoe.effects.train import generate
from nmoe.effects.train.generate import Network
from nmoe.pure.core.key import Key
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.model import forward

LOSS_CHUNK = 1024
"""Tokens whose logits exist at once."""


def _go_on() -> None:
    """For an evaluation that nobody interrupts."""


@attrs.frozen(kw_only=True)
class Judged:
    """A model as the tasks see it. Tests put an oracle, a unigram and a guesser in its place."""

    bits: Callable[[Sequence[tuple[str, str]]], list[float]]  # prompt, continuation -> bits of the continuation
    extend: Callable[[Sequence[str], int], list[str]]  # prompts, tokens at most -> greedy continuations
    between: Callable[[], None] = _go_on  # called between what takes seconds; may raise


def of_network(network: Network, tokenizer: Tokenizer, between: Callable[[], None] = _go_on) -> Judged:
    """A trained model. Prompt and continuation are tokenized apart.

    between  called between forward passes, as often on every rank; may raise
    """
    encoder = encoding(tokenizer)

    def bits(pairs: Sequence[tuple[str, str]]) -> list[float]:
        rows = [
            row
            for place, (prompt, text) in enumerate(pairs)
            for row in _rows(
                *(encode(encoder, part).tolist() for part in (prompt, text)),
                place=place,
                first=tokenizer.end_of_text,
                most=network.config.max_positions,
            )
        ]
        return _bits(network, rows, len(pairs), between)

    def extend(prompts: Sequence[str], num_tokens: int) -> list[str]:
        added: list[str] = []
        for start in range(0, len(prompts), 16):
            part = prompts[start : start + 16]
            longest = max(len(encode(encoder, prompt)) or 1 for prompt in part)
            room = min(num_tokens, network.config.max_positions + 1 - longest)
            added += (
                generate.texts(
                    network,
                    tokenizer,
                    part,
                    num_tokens=room,
                    sampling=Sampling(),
                    key=Key(0),
                    cached=network.env.kind.cache is not None,
                )
                if room > 0
                else [""] * len(part)
            )
            between()
        return added

    return Judged(bits=bits, extend=extend, between=between)


@attrs.frozen(kw_only=True)
class _Row:
    """Tokens of one text that are read together; the first `ignored` targets do not count."""

    place: int
    tokens: list[int]
    ignored: int


def _rows(prompt: list[int], text: list[int], *, place: int, first: int, most: int) -> list[_Row]:
    """A text after its prompt, behind the end of another; in rows of `most` tokens where it is longer.

    Of a prompt that leaves no room the end is kept.
    """
    room = max(most - len(text), 0)
    prompt = [first, *prompt][-room - 1 :] if room else [first]
    every = prompt + text
    rows: list[_Row] = []
    for start in range(0, len(every) - 1, most):
        tokens = every[start : start + most + 1]
        ignored = min(max(len(prompt) - 1 - start, 0), len(tokens) - 1)
        rows.append(_Row(place=place, tokens=tokens, ignored=ignored))
    return rows


@torch.no_grad()
def _bits(network: Network, rows: Sequence[_Row], count: int, between: Callable[[], None]) -> list[float]:
    """Bits of each of `count` texts, from all of its rows. Rows of like lengths share a forward pass, and ranks share
    out its rows: the last of them have rows that do not count where it takes that to have as many."""
    c, device, ranks = network.config, network.router_bias.device, network.ranks
    order = sorted((row for row in rows if row.ignored < len(row.tokens) - 1), key=lambda row: len(row.tokens))
    costs = torch.zeros(len(order), device=device)
    done = 0
    while done < len(order):
        left = order[done:]
        world = ranks.world.size
        size = sum(len(row.tokens) * (place // world + 1) <= network.batch_tokens for place, row in enumerate(left))
        part = left[: max(size, world)]
        share, width = -(-len(part) // world), len(part[-1].tokens) - 1
        first = ranks.world.rank * share
        own = part[first : first + share]
        padded = [row.tokens[:-1] + [0] * (width + 1 - len(row.tokens)) for row in own]
        tokens = torch.tensor(padded + [[0] * width] * (share - len(own)), device=device)
        hidden, _ = forward(network.params, tokens, network.router_bias, network.env, c)
        for place, (row, states) in enumerate(zip(own, hidden, strict=False), done + first):
            target = torch.tensor([-1] * row.ignored + row.tokens[1 + row.ignored :], device=device)
            _, costs[place] = network.env.ops.linear_cross_entropy(
                states[: len(target)], network.params.head, target, chunk=LOSS_CHUNK, logit_scale=c.logit_scale
            )
        done += len(part)
        between()
    (costs,) = all_reduce_sum(ranks.world, (costs,))
    sums = [0.0] * count
    for row, value in zip(order, costs.tolist(), strict=True):
        sums[row.place] += value / math.log(2)
    return sums
