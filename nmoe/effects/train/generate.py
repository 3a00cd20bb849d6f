"""`nmoe generate`: continue a text with the weights of a run."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from nmoe.config import load_valid
from nmoe.config.sections import Model as ModelConfig
from nmoe.effects.checkpoint import weights
from nmoe.effects.data.tokenizer import encoding, load
from nmoe.effects.device import gpu, ops
from nmoe.effects.terminal import say
from nmoe.effects.train.step import tokens_per_step
from nmoe.errors import InputError
from nmoe.pure.core.key import Key
from nmoe.pure.model import model
from nmoe.pure.model.blueprint import make_blueprint
from nmoe.pure.model.model import Transformer
from nmoe.pure.model.ops import Env, environment


@torch.no_grad()
def extend(
    p: Transformer,
    router_bias: Tensor,
    env: Env,
    c: ModelConfig,
    tokens: list[int],
    *,
    num_tokens: int,
    vocab_size: int,
    temperature: float,
    key: Key,
) -> list[int]:
    """Sample `num_tokens` more tokens after `tokens`, one by one, without a cache of keys and values.

    The model sees the last `max_positions` tokens and runs again for every token: for samples, not for serving.

    vocab_size   ids the tokenizer knows; the model may have more rows
    temperature  divisor of the logits; 0 takes the most likely token
    key          of the draws

    Raises:  InputError when a logit is not finite.
    """
    device = router_bias.device
    generator = key.generator(device)
    tokens = list(tokens)
    for _ in range(num_tokens):
        context = torch.tensor([tokens[-c.max_positions :]], device=device)
        x, _ = model.forward(p, context, router_bias, env, c)
        logits = (x[0, -1] @ p.head)[:vocab_size].float() * c.logit_scale
        if not torch.isfinite(logits).all():
            raise InputError(
                "weights: expected finite logits, got some that are not; use the weights of a training that did not "
                "diverge"
            )
        if temperature == 0:
            tokens.append(int(logits.argmax().item()))
        else:
            probability = torch.softmax(logits / temperature, -1)
            tokens.append(int(torch.multinomial(probability, 1, generator=generator).item()))
    return tokens


def main(folder: Path, prompt: str, num_tokens: int, temperature: float, seed: int) -> int:
    """Print `prompt` and its continuation by the weights of the run in `folder`."""
    if not (folder / "config.toml").is_file():
        raise InputError(f"{folder}: expected config.toml of a run, got none; `nmoe runs list` shows the runs")
    if num_tokens < 1:
        raise InputError(f"--tokens: expected at least 1, got {num_tokens}; ask for more")
    if temperature and not 1e-4 <= temperature <= 1e4:  # logits / 1e-40 is infinite in fp32
        raise InputError(
            f"--temperature: expected 0 or a number from 1e-4 to 1e4, got {temperature}; 0 takes the most likely token"
        )
    config = load_valid(folder / "config.toml", {}, ()).config
    c = config.model
    tokenizer = load(folder)
    encoder = encoding(tokenizer)
    params, router_bias = weights.load(folder, make_blueprint(config))
    start = encoder.encode_ordinary(prompt) or [tokenizer.end_of_text]
    env = environment(c, min(c.max_positions, len(start) + num_tokens), ops.build(gpu.device("cpu"), c))
    tokens = extend(
        params,
        router_bias,
        env,
        model.model_at(c, env, config.train.steps * tokens_per_step(config)),
        start,
        num_tokens=num_tokens,
        vocab_size=tokenizer.size,
        temperature=temperature,
        key=Key(seed).fold("sample", prompt),
    )
    say(encoder.decode(tokens).replace("<|endoftext|>", os.linesep))
    return 0
