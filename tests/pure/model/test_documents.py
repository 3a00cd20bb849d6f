"""Documents packed into a row: each is read as if it stood alone."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nmoe.effects.device.cpu import attend_mla_padded
from nmoe.pure.core import tree
from nmoe.pure.data import order as mixture
from nmoe.pure.model import model
from nmoe.pure.model.attention.mla import attend_mla
from nmoe.pure.model.ops import Env
from nmoe.pure.model.rope import Rope
from tests import shapes

END = 36
LENGTHS = ((1, 7, 3, 5), (16,), (4, 12))
"""Documents of each row."""


def packed(c: Any) -> Tensor:
    """[3 16]: rows of documents, each closed by end of text."""
    tokens = torch.randint(END, (3, 16), generator=torch.Generator().manual_seed(3))
    for row, lengths in enumerate(LENGTHS):
        for end in np.cumsum(lengths):
            tokens[row, end - 1] = END
    return tokens


def starts(tokens: Tensor) -> Tensor:
    """Of every token."""
    return torch.from_numpy(mixture.starts(tokens.numpy(), END))


def logits(p: model.Transformer, tokens: Tensor, start: Tensor | tuple[()], c: Any, attend: Any = attend_mla) -> Tensor:
    """[B T V] fp64, rotation included."""
    env = shapes.env(c)
    table, ops = env.tables, env.ops
    ops = attrs.evolve(ops, attention=attrs.evolve(ops.attention, attend=attend))
    env = Env(ops, Rope(table.cos.double(), table.sin.double()), env.kind)
    x, _ = model.forward(p, tokens, shapes.router_bias(c), env, c, start)
    return x @ p.head


@pytest.mark.parametrize("attend", [attend_mla, attend_mla_padded])
def test_a_packed_document_reads_as_if_alone(attend: Any) -> None:
    """Logits, and the gradient of a random weighing of them, document by document."""
    c = shapes.config(attention=shapes.attention(q_lora_rank=7))
    tokens = packed(c)
    weigh = torch.randn(3, 16, c.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    on_all_ranks = shapes.parameters(c)
    found = logits(on_all_ranks, tokens, starts(tokens), c, attend)
    (found * weigh).sum().backward()
    alone = shapes.parameters(c)
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            part = slice(begin, begin + length)
            expected = logits(alone, tokens[row : row + 1, part], (), c)
            torch.testing.assert_close(found[row : row + 1, part], expected, rtol=0, atol=1e-12)
            (expected * weigh[row : row + 1, part]).sum().backward()
            begin += length
    for (path, ours), (_, theirs) in zip(tree.leaves(on_all_ranks), tree.leaves(alone), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12, msg=lambda text, p=path: p + text)


def test_a_row_of_one_document_reads_as_without_a_mask() -> None:
    c = shapes.config()
    p, tokens = shapes.parameters(c), packed(c)[1:2]
    torch.testing.assert_close(logits(p, tokens, starts(tokens), c), logits(p, tokens, (), c), rtol=0, atol=1e-12)


def test_without_the_mask_documents_see_each_other() -> None:
    """What the comparison above is worth."""
    c = shapes.config()
    p, tokens = shapes.parameters(c), packed(c)
    differ = (logits(p, tokens, starts(tokens), c) - logits(p, tokens, (), c)).abs().amax(-1) > 1e-6
    assert not differ[0, 0] and differ[0, 1:].all()
    assert not differ[1].any()
    assert not differ[2, :4].any() and differ[2, 4:].all()


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4))
def test_starts_follow_ends(rows: list[list[int]]) -> None:
    found = mixture.starts(np.array(rows, dtype=np.uint16), 2)
    assert found.dtype == np.int32
    for row, begins in zip(rows, found.tolist(), strict=True):
        for index, begin in enumerate(begins):
            assert begin == 0 or row[begin - 1] == 2
            assert 2 not in row[begin:index]
