"""Grouped-query attention against `transformers`' gpt-oss, a dense formula, and what it claims to cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, modeling_rope_utils
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss import modeling_gpt_oss

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.model import model
from nmoe.pure.model.attention import KINDS, gqa
from nmoe.pure.model.norm import rms_norm
from nmoe.pure.model.ops import Env, environment
from nmoe.pure.model.rope import Rope, documents
from tests import shapes
from tests.conftest import Doubled
from tests.gpt_oss import hf_settings, hf_tensors
from tests.memory import Kept, Largest

KIND = KINDS[sections.Gqa]
WIDTH = 12


def section(**changes: Any) -> sections.Gqa:
    """Six query heads in two groups, a window of three tokens, sinks."""
    c = sections.Gqa(num_heads=6, num_kv_heads=2, head_dim=8, window=3, sinks=True, rope_theta=100.0)
    return attrs.evolve(c, **changes)


def random(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    """Normal values in fp64."""
    return torch.randn(shape, dtype=torch.float64, generator=Key(seed).fold(*shape).generator()).requires_grad_(grad)


def parameters(c: sections.Gqa) -> gqa.Gqa:
    """Leaves in fp64 that require gradients; sinks and biases are uneven."""
    values = init(Key(0), KIND.specs(c), {"D": WIDTH, "L": 1, **KIND.dims(c)})

    def leaf(path: str, value: Tensor) -> Tensor:
        return (value.double() + random(*value.shape) * (path in ("sinks", "qkv_bias", "out_bias"))).requires_grad_()

    return tree.map(leaf, values)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of four queries, so that tiny rows have several, the last of them short."""
    monkeypatch.setattr(gqa, "QUERIES", 4)
    return 4


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their rotation in fp64, as in `test_parity`."""
    for module in (modeling_gpt_oss, modeling_rope_utils):
        monkeypatch.setattr(module, "torch", Doubled())
    yield


YARN = sections.Yarn(factor=8.0, original_positions=64, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.3)
SECTIONS = {
    "window": section(),
    "window of the query alone": section(window=1),
    "window beyond the row": section(window=100),
    "all keys": section(window=None),
    "no sinks": section(sinks=False),
    "biases": section(biases=True),
    "biases, one group, no window": section(biases=True, num_kv_heads=1, window=None),
    "one head": section(num_heads=1, num_kv_heads=1),
    "one group": section(num_kv_heads=1),
    "a key head a query head": section(num_kv_heads=6),
    "yarn": section(yarn=YARN),
    "yarn as gpt-oss has it": section(yarn=attrs.evolve(YARN, truncate=False, mscale=1.0, mscale_all_dim=1.0)),
}


@pytest.mark.usefixtures("doubled", "small_blocks")
@pytest.mark.parametrize("name", SECTIONS)
def test_outputs_and_every_gradient_are_those_of_gpt_oss(name: str) -> None:
    c, positions = SECTIONS[name], 11
    p, x = parameters(c), random(2, positions, WIDTH, grad=True)
    sliding = c.window is not None
    config = GptOssConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["sliding_attention" if sliding else "full_attention"],
        **hf_settings(c),
    )
    config._attn_implementation = "eager"
    theirs = modeling_gpt_oss.GptOssAttention(config, 0).double()
    named = hf_tensors(p, c)
    theirs.load_state_dict(named, strict=True)
    cos, sin = modeling_gpt_oss.GptOssRotaryEmbedding(config)(x, torch.arange(positions)[None])
    mask = (create_sliding_window_causal_mask if sliding else create_causal_mask)(
        config=config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=None
    )
    expected, _ = theirs(x, (cos, sin), mask)

    # their table has YaRN's whole factor, of which ours leaves a part to the scores
    ratio = 1.0 if c.yarn is None else (gqa.scale(c) * c.head_dim**0.5) ** 0.5
    rope = Rope(cos[0] / ratio, sin[0] / ratio)
    found = KIND.apply(p, x, rope, rms_norm, KIND.reference, c, eps=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    weigh = random(*found.shape, seed=1)
    leaves = [leaf for _, leaf in tree.leaves(p)]
    ours = torch.autograd.grad((found * weigh).sum(), [x, *leaves])
    their_parameters = dict(theirs.named_parameters())
    right_x, *right = torch.autograd.grad((expected * weigh).sum(), [x, *their_parameters.values()])
    # back through the renaming, which reorders channels; without sinks theirs are a constant
    pairs = [pair for pair in zip(their_parameters, right, strict=True) if named[pair[0]].requires_grad]
    pulled = torch.autograd.grad([named[key] for key, _ in pairs], leaves, [gradient for _, gradient in pairs])
    for mine, theirs_ in zip(ours, (right_x, *pulled), strict=True):
        assert c.window == 1 or mine.abs().max() > 1e-6
        torch.testing.assert_close(mine, theirs_, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("name", ["window", "yarn", "yarn as gpt-oss has it"])
def test_the_rotation_table_is_theirs_rounded_once(name: str) -> None:
    c = SECTIONS[name]
    config = GptOssConfig(hidden_size=WIDTH, **hf_settings(c))
    cos, _ = modeling_gpt_oss.GptOssRotaryEmbedding(config)(random(1, 1), torch.arange(64)[None])
    ratio = 1.0 if c.yarn is None else (gqa.scale(c) * c.head_dim**0.5) ** 0.5
    assert (KIND.tables(c, 64).cos.double() * ratio - cos[0]).abs().max() <= 2.0**-24 * ratio


def dense(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | tuple[()], start: Tensor | tuple[()], window: int | None
) -> Tensor:
    """The formula with a [B H T T] mask and repeated keys; sinks by `o · sigmoid(lse - sink)`."""
    k, v = (heads.repeat_interleave(q.shape[2] // k.shape[2], 2) for heads in (k, v))
    score = torch.einsum("bihc,bjhc->bhij", q, k) * q.shape[-1] ** -0.5
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    hidden = (j > i) | (i - j >= (window or q.shape[1]))
    if isinstance(start, Tensor):
        hidden = (hidden | (j < start[:, :, None]))[:, None]
    score = score.masked_fill(hidden, -torch.inf)
    o = torch.einsum("bhij,bjhc->bihc", score.softmax(-1), v)
    if not isinstance(sinks, Tensor):
        return o
    return o * torch.sigmoid(score.logsumexp(-1) - sinks[:, None]).transpose(1, 2)[..., None]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 50])
@pytest.mark.parametrize("length", [1, 4, 5, 8, 11])
def test_blocks_are_the_dense_formula(length: int, window: int | None, heads: tuple[int, int]) -> None:
    """Rows of one token, of one block, of one block and one; documents of one token; a window beyond the row."""
    many, few = heads
    q, k, v = (random(2, length, each, 4, seed=seed, grad=True) for seed, each in enumerate((many, few, few)))
    logits, weigh = random(many, grad=True), random(2, length, many, 4, seed=9)
    alone = torch.arange(length, dtype=torch.int32).expand(2, -1)
    for sinks in ((), logits):
        for start in ((), alone, torch.where(alone >= length // 2, length // 2, 0)):
            results = [
                gqa.attend_gqa(q, k, v, sinks, start, scale=0.5, window=window),
                dense(q, k, v, sinks, start, window),
            ]
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
            inputs = [q, k, v, *([] if isinstance(sinks, tuple) else [sinks])]
            gradients = [torch.autograd.grad((result * weigh).sum(), inputs) for result in results]
            torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("small_blocks")
def test_equal_scores_share_evenly_with_the_sink() -> None:
    v = random(1, 9, 1, 2)
    zeros = torch.zeros(1, 9, 2, 2, dtype=torch.float64)
    found = gqa.attend_gqa(zeros, v * 0, v, torch.zeros(2), scale=1.0, window=3)
    for i in range(9):
        seen = v[0, max(0, i - 2) : i + 1, 0]
        expected = (seen.sum(0) / (len(seen) + 1)).expand(2, -1)
        torch.testing.assert_close(found[0, i], expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_finite_differences(window: int | None) -> None:
    q, k, v = (random(1, 6, each, 2, seed=seed, grad=True) for seed, each in enumerate((2, 1, 1)))

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return gqa.attend_gqa(q, k, v, sinks, scale=0.7, window=window)

    inputs = (q, k, v, random(2, grad=True))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def kept(c: sections.Gqa, length: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Bytes that autograd keeps of one layer on the device "meta", masks apart, and the largest tensor's elements."""
    sizes = {"D": WIDTH, **KIND.dims(c)}
    with torch.device("meta"):
        p = tree.map(lambda _, spec: torch.empty(spec.shape(sizes), dtype=dtype, requires_grad=True), KIND.specs(c))
        x = torch.empty(1, length, WIDTH, dtype=dtype, requires_grad=True)
        rope = Rope(*(torch.empty(length, c.head_dim // 2) for _ in range(2)))
        found = Kept((p.qkv, p.out, p.sinks, rope.cos, rope.sin))
        with Largest() as largest, found:
            result = KIND.apply(p, x, rope, rms_norm, KIND.reference, c, eps=1e-6)
        with Largest() as backward:
            result.sum().backward()
    return found.nbytes(), max(largest.elements, backward.elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 200])
def test_kept_bytes_are_what_autograd_keeps(window: int | None, dtype: torch.dtype) -> None:
    c = section(window=window)
    total, _ = kept(c, 512, dtype)
    planned = KIND.kept_bytes(c, hidden=WIDTH, sequence_length=512, element=dtype.itemsize, square=True)
    assert planned * 512 == pytest.approx(total, rel=0.02)


def test_memory_grows_linearly_with_the_row() -> None:
    """From 4 k to 32 k tokens: bytes kept, and no tensor larger than the queries or one block's scores."""
    c = section(window=128)
    found = {length: kept(c, length) for length in (4096, 8192, 16384, 32768)}
    slopes = [(found[2 * length][0] - found[length][0]) / length for length in (4096, 8192, 16384)]
    assert slopes[0] == slopes[1] == slopes[2]
    planned = KIND.kept_bytes(c, hidden=WIDTH, sequence_length=32768, element=4, square=True)
    assert slopes[0] == pytest.approx(planned, rel=0.02)
    scores = c.num_heads * gqa.QUERIES * (gqa.QUERIES + 128)
    for length, (_, largest) in found.items():
        assert largest <= max(scores, length * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim)


@pytest.mark.parametrize("window", [None, 1, 128, 300, 1000])
@pytest.mark.parametrize("length", [1, 128, 300, 512])
def test_flops_count_attended_pairs_and_what_torch_counts(length: int, window: int | None) -> None:
    c = section(window=window)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    pairs = int(((j <= i) & (i - j < (window or length))).sum())
    found = KIND.flops(c, sequence_length=length, causal=True)
    assert found == 4 * c.num_heads * c.head_dim * pairs // length
    with FlopCounterMode(display=False) as counter:
        heads = [torch.empty(1, length, each, c.head_dim, device="meta") for each in (6, 2, 2)]
        gqa.attend_gqa(*heads, scale=1.0, window=window)
    executed = KIND.flops(c, sequence_length=length, causal=False)
    assert executed == counter.get_total_flops() // length
    assert found <= executed


def composed(**changes: Any) -> sections.Model:
    """A model whose second layer is global."""
    return shapes.config(num_layers=3, attention=section(global_every=2, **changes))


def logits(p: model.Transformer, tokens: Tensor, c: sections.Model, start: Tensor | tuple[()] = ()) -> Tensor:
    """[B T V] in fp64, rotation included."""
    env = shapes.env(c)
    env = Env(env.ops, Rope(env.tables.cos.double(), env.tables.sin.double()), env.kind)
    return model.forward(p, tokens, shapes.router_bias(c), env, c, start)[0] @ p.head


def reach(c: sections.Model) -> list[int]:
    """How many tokens back the last logit of a row of twelve depends on."""
    p, tokens = shapes.parameters(c), shapes.batch(c, sequences=1, positions=12).tokens
    last = logits(p, tokens, c)[0, -1]
    changed = [torch.cat((tokens[:, :i], (tokens[:, i : i + 1] + 1) % 37, tokens[:, i + 1 :]), 1) for i in range(12)]
    return [11 - i for i, row in enumerate(changed) if (logits(p, row, c)[0, -1] - last).abs().max() > 1e-9]


def test_every_nth_layer_is_global() -> None:
    """Two layers of a window of three reach four tokens back; with a global one among them, all."""
    assert max(reach(attrs.evolve(composed(), num_layers=2, attention=section()))) == 4
    assert max(reach(attrs.evolve(composed(), num_layers=2))) == 11
    c = section(global_every=3)
    assert [KIND.at_layer(c, layer).window for layer in range(6)] == [3, 3, None, 3, 3, None]


def test_a_packed_document_reads_as_if_alone() -> None:
    c = composed()
    p, tokens = shapes.parameters(c), shapes.batch(c, sequences=1, positions=12).tokens
    begins = (0, 1, 5, 6)
    start = torch.zeros(1, 12, dtype=torch.int32)
    for begin in begins:
        start[:, begin:] = begin
    found = logits(p, tokens, c, start)
    for begin, end in zip(begins, (*begins[1:], 12), strict=True):
        alone = logits(p, tokens[:, begin:end], c)
        torch.testing.assert_close(found[:, begin:end], alone, rtol=0, atol=1e-12)
    assert documents(start) != ()


@pytest.mark.parametrize("sinks", [True, False])
def test_the_composed_model_learns(sinks: bool) -> None:
    c = composed(sinks=sinks)
    p, batch, env = shapes.parameters(c, dtype=torch.float32), shapes.batch(c, positions=24), environment(c, 24)
    optimizer = torch.optim.AdamW([leaf for _, leaf in tree.leaves(p)], lr=1e-2)
    bias, losses = shapes.router_bias(c, dtype=torch.float32), list[float]()
    for _ in range(12):
        loss, _, _ = model.objective(
            p, batch, bias, env, c, num_targets=(batch.targets >= 0).sum(), num_sequences=2, chunk=16
        )
        loss.backward()
        gradients = [leaf.grad for _, leaf in tree.leaves(p.blocks[0].attention)]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
