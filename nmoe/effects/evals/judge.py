"""What a task may ask of a model: the cost of a continuation, and a continuation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from nmoe.effects.data.tokenizer import Tokenizer, encode, encoding
from nmoe.effects.train import generate
from nmoe.effects.train.generate import Network
from nmoe.pure.core.key import Key
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.model import forward

BATCH_TOKENS = 8192
"""Tokens of a forward pass, as far as one row has fewer."""

LOSS_CHUNK = 1024
"""Tokens whose logits exist at once."""


@attrs.frozen(kw_only=True)
class Judged:
    """A model as the tasks see it. Tests put an oracle, a unigram and a guesser in its place."""

    bits: Callable[[Sequence[tuple[str, str]]], list[float]]  # prompt, continuation -> bits of the continuation
    extend: Callable[[Sequence[str], int], list[str]]  # prompts, characters at most -> greedy continuations


def of_network(network: Network, tokenizer: Tokenizer) -> Judged:
    """A trained model. Prompt and continuation are tokenized apart."""
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
        return _bits(network, rows, len(pairs))

    def extend(prompts: Sequence[str], chars: int) -> list[str]:
        added: list[str] = []
        for start in range(0, len(prompts), 16):
            part = prompts[start : start + 16]
            longest = max(len(encode(encoder, prompt)) or 1 for prompt in part)
            room = min(chars, network.config.max_positions + 1 - longest)
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
        return added

    return Judged(bits=bits, extend=extend)


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
def _bits(network: Network, rows: Sequence[_Row], count: int) -> list[float]:
    """Bits of each of `count` texts, from all of its rows. Rows of like lengths share a forward pass."""
    c, device = network.config, network.router_bias.device
    order = sorted((row for row in rows if row.ignored < len(row.tokens) - 1), key=lambda row: len(row.tokens))
    costs: list[Tensor] = []
    while len(costs) < len(order):
        left = order[len(costs) :]
        size = max(1, sum(len(row.tokens) * (place + 1) <= BATCH_TOKENS for place, row in enumerate(left)))
        part = left[:size]
        width = len(part[-1].tokens) - 1
        tokens = torch.tensor([row.tokens[:-1] + [0] * (width + 1 - len(row.tokens)) for row in part], device=device)
        hidden, _ = forward(network.params, tokens, network.router_bias, network.env, c)
        for row, states in zip(part, hidden, strict=True):
            target = torch.tensor([-1] * row.ignored + row.tokens[1 + row.ignored :], device=device)
            _, nll = network.env.ops.linear_cross_entropy(
                states[: len(target)], network.params.head, target, chunk=LOSS_CHUNK, logit_scale=c.logit_scale
            )
            costs.append(nll)
    sums = [0.0] * count
    values: list[float] = torch.stack(costs).tolist() if costs else []
    for row, value in zip(order, values, strict=True):
        sums[row.place] += value / math.log(2)
    return sums
