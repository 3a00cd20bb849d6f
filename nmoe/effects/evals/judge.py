"""What a task may ask of a model: the cost of a continuation, and a continuation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile

import attrs
import torch
from torch import Tensor

from nmoe.effects.data.tokenizer import Tokenizer, encode, encoding
from nmoe.effects.parallel.ranks import all_reduce_sum
from nmoe.effects.train import generate
from nmoe.effects.train.generate import Network
from nmoe.pure.core.key import Key
from nmoe.pure.model.decode import Sampling
from nmoe.pure.model.loss import token_losses
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
        read = [
            row
            for place, (prompt, text) in enumerate(pairs)
            for row in rows(
                *(encode(encoder, part).tolist() for part in (prompt, text)),
                place=place,
                first=tokenizer.end_of_text,
                most=network.config.max_positions,
            )
        ]
        return [nats / math.log(2) for nats, _ in scored(network, read, len(pairs), between)]

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
class Row:
    """Tokens of one text that are read together; the first `ignored` targets do not count."""

    place: int  # of the text
    tokens: list[int]
    ignored: int


def rows(prompt: list[int], text: list[int], *, place: int, first: int, most: int) -> list[Row]:
    """A text after its prompt, behind the end of another; in rows of `most` tokens where it is longer.

    Of a prompt that leaves no room the end is kept.
    """
    room = max(most - len(text), 0)
    prompt = [first, *prompt][-room - 1 :] if room else [first]
    every = prompt + text
    made: list[Row] = []
    for start in range(0, len(every) - 1, most):
        tokens = every[start : start + most + 1]
        ignored = min(max(len(prompt) - 1 - start, 0), len(tokens) - 1)
        made.append(Row(place=place, tokens=tokens, ignored=ignored))
    return made


@torch.no_grad()
def scored(
    network: Network, texts: Sequence[Row], count: int, between: Callable[[], None] = _go_on
) -> list[tuple[float, bool]]:
    """Of each of `count` texts, from all of its rows: its cost in nats, and whether each token is the likeliest one.

    Rows of like lengths share a forward pass, and ranks share out its rows: the last of them have rows that do not
    count where it takes that to have as many. Logits are made of targets that count, in chunks.
    """
    c, device, world, rank = (
        network.config,
        network.router_bias.device,
        network.ranks.world.size,
        network.ranks.world.rank,
    )
    order = sorted((row for row in texts if row.ignored < len(row.tokens) - 1), key=lambda row: len(row.tokens))
    measured = torch.zeros(len(order), 2, device=device)  # nats, tokens that are not the likeliest
    done = 0
    while done < len(order):
        fit = takewhile(
            lambda at: len(order[at].tokens) * ((at - done) // world + 1) <= network.batch_tokens,  # noqa: B023
            range(done, len(order)),
        )
        part = order[done : done + max(sum(1 for _ in fit), world)]
        share, width = -(-len(part) // world), len(part[-1].tokens) - 1
        first = rank * share
        own = part[first : first + share]
        padded = [row.tokens[:-1] + [0] * (width + 1 - len(row.tokens)) for row in own]
        tokens = torch.tensor(padded + [[0] * width] * (share - len(own)), device=device)
        hidden, _ = forward(network.params, tokens, network.router_bias, network.env, c)
        if own:
            targets = [[-1] * row.ignored + row.tokens[1 + row.ignored :] for row in own]
            target = torch.tensor([row + [-1] * (width - len(row)) for row in targets], device=device)
            measured[done + first : done + first + len(own)] = _by_row(network, hidden[: len(own)], target)
        done += len(part)
        between()
    (measured,) = all_reduce_sum(network.ranks.world, (measured,))
    nats, others = [0.0] * count, [0.0] * count
    for row, (cost, missed) in zip(order, measured.tolist(), strict=True):
        nats[row.place] += cost
        others[row.place] += missed
    return [(cost, missed == 0) for cost, missed in zip(nats, others, strict=True)]


def _by_row(network: Network, hidden: Tensor, target: Tensor) -> Tensor:
    """Nats of each row, and its tokens that are not the likeliest ones [B 2].

    hidden  [B T D]
    target  [B T] i64   negative: does not count
    """
    (index,) = (target.flatten() >= 0).nonzero(as_tuple=True)
    losses, likeliest = token_losses(
        hidden.flatten(0, 1)[index],
        network.params.head,
        target.flatten()[index],
        chunk=LOSS_CHUNK,
        logit_scale=network.config.logit_scale,
    )
    per_token = torch.stack((losses, (~likeliest).to(losses.dtype)), dim=-1)
    # Not `index_add`, whose order of additions on a GPU differs from run to run.
    return per_token.new_zeros(target.numel(), 2).index_copy(0, index, per_token).unflatten(0, target.shape).sum(1)
