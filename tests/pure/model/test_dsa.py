"""DeepSeek sparse attention against `transformers`' DeepSeek-V3.2, dense masks, and what it claims to cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32 import modeling_deepseek_v32

from nmoe.config import sections
from nmoe.pure.core import tree
from nmoe.pure.core.init import init
from nmoe.pure.core.key import Key
from nmoe.pure.model import model
from nmoe.pure.model.attention import KINDS, dsa, mla
from nmoe.pure.model.attention.blocks import best
from nmoe.pure.model.norm import rms_norm
from nmoe.pure.model.ops import Env, environment
from nmoe.pure.model.rope import Rope, documents
from tests import shapes
from tests.conftest import Doubled
from tests.memory import kept_by_blocks
from tests.pure.model.test_gqa import random

KIND = KINDS[sections.Dsa]
WIDTH = 12


def section(**changes: Any) -> sections.Dsa:
    """A query reads five keys."""
    return attrs.evolve(shapes.dsa(rope_theta=100.0, index_head_dim=8, index_top_k=5), **changes)


def parameters(c: sections.Dsa, dtype: torch.dtype = torch.float64) -> dsa.Dsa:
    """Leaves that require gradients; gains and shifts are uneven."""
    specs = KIND.specs(c)
    values = init(Key(0), specs, {"D": WIDTH, "L": 1, **KIND.dims(c)})

    def leaf(path: str, value: Tensor) -> Tensor:
        return (value.double() + 0.3 * random(*value.shape) * (value.ndim == 1)).to(dtype).requires_grad_()

    return tree.map(leaf, values)


def table(c: sections.Dsa, positions: int) -> Rope:
    """The rotation table in fp64."""
    frequency = c.rope_theta ** (-torch.arange(0, c.qk_rope_head_dim, 2, dtype=torch.float64) / c.qk_rope_head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return Rope(angle.cos(), angle.sin())


def run(p: dsa.Dsa, x: Tensor, c: sections.Dsa, start: Tensor | tuple[()] = (), ops: Any = None) -> Any:
    """Output and loss in fp64."""
    ops = ops or KIND.reference
    return KIND.apply(p, x, table(c, x.shape[1]), rms_norm, ops, c, documents(start), eps=1e-6)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of four queries, so that tiny rows have several, the last of them short."""
    monkeypatch.setattr(dsa, "QUERIES", 4)
    return 4


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Theirs in fp64, the indexer's scores apart: these they cast by a method."""
    monkeypatch.setattr(modeling_deepseek_v32, "torch", Doubled())
    yield


def hf_tensors(p: dsa.Dsa, c: sections.Dsa) -> dict[str, Tensor]:
    """Names and tensors of `transformers`."""
    named, leaves = dict[str, Tensor](), dict(tree.leaves(p))
    for path, leaf in dsa.hf_leaves(c).items():
        named |= leaf.split(leaves[path])
    return named


YARN = sections.Yarn(factor=8.0, original_positions=64, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.3)
SECTIONS = {
    "plain": section(),
    "one head": section(num_heads=1, index_num_heads=1),
    "one key": section(index_top_k=1),
    "more keys than tokens": section(index_top_k=100),
    "only rotated channels in the indexer": section(index_head_dim=4),
    "warm-up": section(index_warmup_tokens=1),
    "yarn": section(yarn=YARN),
}


@pytest.mark.usefixtures("doubled", "small_blocks")
@pytest.mark.parametrize("name", SECTIONS)
def test_outputs_and_every_gradient_are_those_of_deepseek(name: str) -> None:
    """Our keys are theirs too, and are forced upon ours so that no near-tie decides."""
    c, positions = SECTIONS[name], 23
    p, x = parameters(c), random(2, positions, WIDTH, grad=True)
    settings = mla.hf_settings(c) | {"max_position_embeddings": 64 if c.yarn is None else 512}
    top_k = positions if c.index_warmup_tokens else c.index_top_k
    indexer: dict[str, Any] = {"index_topk": top_k, "index_n_heads": c.index_num_heads}
    indexer["index_head_dim"] = c.index_head_dim
    config = DeepseekV32Config(hidden_size=WIDTH, **settings, **indexer)
    config._attn_implementation = "eager"
    theirs = modeling_deepseek_v32.DeepseekV32Attention(config, 0).double()
    named = hf_tensors(p, c)
    theirs.load_state_dict(named, strict=True)
    found: list[Any] = []
    theirs.indexer.register_forward_hook(lambda module, given, result: found.append(result))
    # YaRN scales the scores; the table's own factor is 0.7 against 1.3
    rope = KIND.tables(c, positions)
    rope = Rope(rope.cos.double(), rope.sin.double())
    mask = torch.full((positions, positions), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    cos, sin = (torch.cat((each, each), dim=-1)[None] for each in (rope.cos, rope.sin))
    expected, _ = theirs(x, (cos, sin), mask.expand(2, 1, -1, -1))

    rows = torch.arange(positions)[:, None]
    masked = found[0].long().masked_fill(found[0] > rows, positions).sort(-1).values
    chosen = masked.masked_fill(masked == positions, -1).int()
    ops = attrs.evolve(KIND.reference, select=lambda *_, **__: chosen)
    output, _ = KIND.apply(p, x, rope, rms_norm, ops, c, eps=1e-6)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)

    # of equal scores, where no head of the indexer is positive, theirs takes any
    low = rms_norm(x @ p.latent.down[:, : c.q_lora_rank], p.latent.query.norm, eps=1e-6)  # pyright: ignore[reportAttributeAccessIssue]
    index = dsa.project_index(p.indexer, x, low, rope, ())
    scores, own = dsa.index_scores(*index).detach(), dsa.select(*index, count=top_k)
    values = [
        scores.gather(-1, each.clamp(min=0).long()).masked_fill(each < 0, -torch.inf).sort(-1).values
        for each in (own, chosen)
    ]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)

    weigh = random(*output.shape, seed=1)
    leaves = [leaf for _, leaf in tree.leaves(p)]
    ours = torch.autograd.grad((output * weigh).sum(), [x, *leaves], materialize_grads=True)
    their_parameters = {key: value for key, value in theirs.named_parameters() if not key.startswith("indexer")}
    right_x, *right = torch.autograd.grad((expected * weigh).sum(), [x, *their_parameters.values()])
    pulled = torch.autograd.grad(
        [named[key] for key in their_parameters], leaves, right, allow_unused=True, materialize_grads=True
    )
    for (path, _), mine, other in zip((("x", x), *tree.leaves(p)), ours, (right_x, *pulled), strict=True):
        assert path.startswith("indexer") == (mine.abs().max() < 1e-9) or c.index_top_k == 1, path
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def dense(p: dsa.Dsa, x: Tensor, c: sections.Dsa) -> tuple[Tensor, Tensor]:
    """One document [T D] with [H T T] scores, expanded keys, and an own selection; the loss, of the indexer alone."""
    t, rope = torch.arange(len(x)), table(c, len(x))

    def turned(each: Tensor) -> Tensor:
        pairs = torch.complex(each[..., ::2], each[..., 1::2])
        angle = torch.complex(rope.cos, rope.sin)
        return torch.view_as_real(pairs * angle.view(len(x), *(1,) * (each.ndim - 2), -1)).flatten(-2)

    query, latent, key = (x @ p.latent.down).split((c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim), -1)
    low = rms_norm(query, p.latent.query.norm, eps=1e-6)  # pyright: ignore[reportAttributeAccessIssue]
    q = torch.einsum("tq,qhc->thc", low, p.latent.query.up)  # pyright: ignore[reportAttributeAccessIssue]
    kv = torch.einsum("tr,rhz->thz", rms_norm(latent, p.latent.norm, eps=1e-6), p.latent.up)
    nope = c.qk_nope_head_dim
    score = torch.einsum("thc,shc->hts", q[..., :nope], kv[..., :nope])
    score = score + torch.einsum("thc,sc->hts", turned(q[..., nope:]), turned(key))

    x, low, own, rotated = x.detach(), low.detach(), p.indexer, c.qk_rope_head_dim
    iq, ik = torch.einsum("tq,qxy->txy", low, own.query), x @ own.key
    ik = (ik - ik.mean(-1, keepdim=True)) / (ik.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    ik = ik * own.gain + own.shift
    iq, ik = (torch.cat((turned(each[..., :rotated]), each[..., rotated:]), -1) for each in (iq, ik))
    index = torch.einsum("txy,sy->xts", iq, ik) * c.index_head_dim**-0.5
    index = torch.einsum("xts,tx->ts", index.clamp(min=0), x @ own.weight * c.index_num_heads**-0.5)

    seen = t <= t[:, None]
    if not c.index_warmup_tokens:
        for i, row in enumerate(index.detach().tolist()):
            picked = sorted(range(i + 1), key=lambda j: (-row[j], j))[: c.index_top_k]
            seen[i] = (t[:, None] == torch.tensor(picked)).any(1)
    probability = (score * mla.scale(c)).masked_fill(~seen, -torch.inf).softmax(-1)
    o = torch.einsum("hts,shu->thu", probability, kv[..., nope:])
    target = probability.detach().mean(0)
    log_own = index.masked_fill(~seen, -torch.inf).log_softmax(-1)
    loss = torch.where(seen & (target > 0), target * (target.clamp(min=1e-300).log() - log_own), 0).sum()
    return torch.einsum("thu,hud->td", o, p.latent.out), loss


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("begins", [(0,), (0, 1, 2, 7, 8), tuple(range(13))], ids=str)
@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "yarn"])
def test_output_loss_and_gradients_are_the_dense_formula(name: str, begins: tuple[int, ...]) -> None:
    """Documents of one token among them; the indexer's gradient comes from its loss, the rest's from the output."""
    c, p, x = SECTIONS[name], parameters(SECTIONS[name]), random(2, 13, WIDTH, grad=True)
    start = torch.zeros(2, 13, dtype=torch.int32)
    for begin in begins:
        start[:, begin:] = begin
    output, loss = run(p, x, c, start if len(begins) > 1 else ())
    spans = tuple(zip(begins, (*begins[1:], 13), strict=True))
    rows = [[dense(p, row[a:b], c) for a, b in spans] for row in x]
    expected = torch.stack([torch.cat([each[0] for each in row]) for row in rows])
    right = torch.stack([each[1] for row in rows for each in row]).sum()
    torch.testing.assert_close((output, loss), (expected, right), rtol=1e-9, atol=1e-9)
    weigh, leaves = random(2, 13, WIDTH, seed=2), [x, *(leaf for _, leaf in tree.leaves(p))]
    both = (
        torch.autograd.grad((o * weigh).sum() + of, leaves, materialize_grads=True)
        for o, of in ((output, loss), (expected, right))
    )
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("warmup", [0, 1])
def test_the_loss_moves_the_indexer_alone(warmup: int) -> None:
    c = section(index_warmup_tokens=warmup, index_loss=0.25)
    p, x = parameters(c), random(2, 13, WIDTH, grad=True)
    output, loss = run(p, x, c)
    _, whole = run(p, x, attrs.evolve(c, index_loss=1.0))
    torch.testing.assert_close(loss, whole / 4)
    named = {"x": x, **dict(tree.leaves(p))}
    of_loss, of_output = (
        dict(zip(named, torch.autograd.grad(each, list(named.values()), allow_unused=True), strict=True))
        for each in (loss, output.sum())
    )
    for path in named:
        mine, other = (of_loss, of_output) if path.startswith("indexer") else (of_output, of_loss)
        assert mine[path].abs().max() > 1e-6, path
        assert other[path] is None or not other[path].any(), path


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_rows_of_one_token_of_one_block_and_of_one_more(length: int) -> None:
    p, x = parameters(section()), random(1, length, WIDTH)
    for changes in ({}, {"index_warmup_tokens": 1}, {"index_top_k": 1}, {"index_top_k": length}):
        c = section(**changes)
        output, loss = run(p, x, c)
        expected, right = dense(p, x[0], c)
        torch.testing.assert_close((output[0], loss), (expected, right), rtol=1e-9, atol=1e-9)


def test_keys_beyond_65535_are_chosen() -> None:
    """The predecessor packed indices into 16 bits, and said nothing when they did not fit."""
    length = 70_001
    score = torch.zeros(1, 2, length)
    wanted = torch.tensor([3, 65_535, 65_536, 65_537, 69_999, 70_000])
    score[0, 0, wanted] = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0, 5.0])
    score[0, 1, 66_000:] = -torch.inf
    found = best(score, 6)
    assert found.dtype is torch.int32
    assert found[0, 0].tolist() == wanted.tolist()
    assert found[0, 1].tolist() == list(range(6))
    # and they are read: the last block of queries of a long row
    q, k, w = torch.zeros(1, length, 1, 2), torch.zeros(1, length, 2), torch.ones(1, length, 1)
    k[0, wanted, 0], q[..., 0] = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0, 5.0]), 1.0
    last = slice(length - 1, length)
    chosen = best(dsa.index_scores(q[:, last], k, w[:, last]), 4)
    assert chosen[0, 0].tolist() == [65_535, 65_536, 65_537, 70_000]
    kv = torch.arange(length, dtype=torch.float64)[None, :, None].expand(-1, -1, 2)
    o, _ = dsa.attend_dsa(
        torch.zeros(1, 1, 1, 2, dtype=torch.float64), kv, q[:, last], k, w[:, last], chosen, scale=1.0, rank=1
    )
    assert o.item() == pytest.approx((65_535 + 65_536 + 65_537 + 70_000) / 4, rel=1e-12)


def test_of_equal_scores_the_lower_index_is_chosen() -> None:
    q, k, w = torch.zeros(1, 9, 2, 4), random(1, 9, 4).float(), random(1, 9, 2).float()
    chosen = dsa.select(q, k, w, count=3)
    assert chosen[0].tolist() == [[0, -1, -1], [0, 1, -1], *[[0, 1, 2]] * 7]
    start = torch.tensor([[0, 0, 2, 2, 2, 2, 2, 7, 7]], dtype=torch.int32)
    assert dsa.select(q, k, w, start, count=3)[0].tolist() == [
        *([0, -1, -1], [0, 1, -1], [2, -1, -1], [2, 3, -1], [2, 3, 4], [2, 3, 4], [2, 3, 4], [7, -1, -1], [7, 8, -1])
    ]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dense_stage", [False, True])
def test_gradients_are_those_of_finite_differences(dense_stage: bool) -> None:
    """Of heads of two channels and a value of one, or of a latent of two; one channel is rotated."""
    index = [random(1, 6, *each, seed=seed, grad=True) for seed, each in enumerate(((2, 2), (2,), (2,)))]
    shapes = ((2, 3), (2, 3), (1,)) if dense_stage else ((2, 3), (3,))
    given = [random(1, 6, *each, seed=seed + 3, grad=True) for seed, each in enumerate(shapes)]
    chosen = dsa.select(*index, count=3)

    def attend(given: Sequence[Tensor], index: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if dense_stage:
            return dsa.attend_dense(given[0], given[1], given[2], *index, scale=0.7)
        return dsa.attend_dsa(given[0], given[1], index[0], index[1], index[2], chosen, scale=0.7, rank=2)

    assert torch.autograd.gradcheck(lambda *given: attend(given, index)[0], given)
    assert torch.autograd.gradcheck(lambda *index: attend(given, index)[1], index)


def kept(
    c: sections.Dsa, length: int, patch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> tuple[int, int]:
    """Bytes that autograd keeps of one layer on the device "meta", and the largest tensor's elements.

    What a recomputed block keeps are its arguments.
    """
    sizes = {"D": WIDTH, **KIND.dims(c)}
    with torch.device("meta"):
        p = tree.map(lambda _, spec: torch.empty(spec.shape(sizes), dtype=dtype, requires_grad=True), KIND.specs(c))
        x = torch.empty(1, length, WIDTH, dtype=dtype, requires_grad=True)
        rope = Rope(*(torch.empty(length, c.qk_rope_head_dim // 2) for _ in range(2)))

        def loss() -> Tensor:
            result, own = KIND.apply(p, x, rope, rms_norm, KIND.reference, c, eps=1e-6)
            return result.sum() + own

        leaves = [rope.cos, rope.sin, *(leaf for _, leaf in tree.leaves(p))]
        return kept_by_blocks(patch, dsa, leaves, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_what_autograd_keeps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    c = section(index_top_k=64)
    total, _ = kept(c, 512, monkeypatch, dtype)
    planned = KIND.kept_bytes(c, hidden=WIDTH, sequence_length=512, element=dtype.itemsize, square=True)
    assert planned * 512 == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("warmup", [0, 1])
def test_memory_grows_linearly_with_the_row(warmup: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1 k to 8 k tokens: bytes kept, and no tensor larger than what one block of queries needs.

    So there is no [B T T], and no copy of the chosen keys for each query.
    """
    monkeypatch.setattr(dsa, "QUERIES", 256)  # fewer blocks, which take the time here
    c = section(index_top_k=64, index_warmup_tokens=warmup)
    found = {length: kept(c, length, monkeypatch) for length in (1024, 2048, 4096, 8192)}
    slopes = [(found[2 * length][0] - found[length][0]) / length for length in (1024, 2048, 4096)]
    assert slopes[0] == slopes[1] == slopes[2]
    for length, (_, largest) in found.items():
        scores = dsa.QUERIES * max(c.num_heads, c.index_num_heads) * length
        chosen = dsa.QUERIES * c.index_top_k * (c.kv_lora_rank + c.qk_rope_head_dim)
        assert largest <= max(scores, chosen, length * c.num_heads * (c.kv_lora_rank + c.qk_rope_head_dim)), length


@pytest.mark.parametrize("top_k", [1, 100, 1000])
@pytest.mark.parametrize("length", [1, 64, 150, 512])
def test_flops_count_attended_pairs_and_what_torch_counts(length: int, top_k: int) -> None:
    """Not those that a full causal attention would have: at 32 k tokens that would be 16 times as many."""
    c = section(index_top_k=top_k)
    t = torch.arange(length) + 1
    a_pair, an_index = 2 * c.num_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim), 2 * c.index_num_heads * 9
    found = KIND.flops(c, sequence_length=length, causal=True)
    assert found == int(a_pair * t.clamp(max=top_k).sum() + an_index * t.sum()) // length
    p = tree.map(lambda _, leaf: leaf.to("meta"), parameters(c, torch.float32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rope = Rope(*(torch.empty(length, c.qk_rope_head_dim // 2, device="meta") for _ in range(2)))
        KIND.apply(p, torch.empty(1, length, WIDTH, device="meta"), rope, rms_norm, KIND.reference, c, eps=1e-6)
    products = 2 * sum(leaf.numel() for _, leaf in tree.leaves(p) if leaf.ndim > 1)
    executed = KIND.flops(c, sequence_length=length, causal=False)
    assert executed == counter.get_total_flops() // length - products
    assert found <= executed


def composed(**changes: Any) -> sections.Model:
    """A model whose every layer is sparse."""
    return shapes.config(attention=section(**changes))


def test_the_stage_follows_the_tokens_read() -> None:
    c = composed(index_warmup_tokens=100)
    env = shapes.env(c)
    stages = [model.model_at(c, env, tokens) for tokens in (0, 99, 100, 10**9)]
    assert stages[:2] == [c, c]
    assert [stage.attention for stage in stages[2:]] == [section()] * 2


def test_in_a_mixed_model_the_sparse_layers_have_stages_and_a_loss() -> None:
    """Latent attention in the first and third layer, the indexer's in the second; documents and stages reach it."""
    latent = sections.Mla(num_heads=3, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    c = shapes.config(attention=sections.Mixed(pattern="ab", a=latent, b=section(index_warmup_tokens=100)))
    p, batch, bias, env = shapes.parameters(c), shapes.batch(c), shapes.router_bias(c), shapes.env(c)
    losses: list[float] = []
    for tokens in (99, 100):
        stage = model.model_at(c, env, tokens)
        assert isinstance(stage.attention, sections.Mixed)
        assert stage.attention.b == section(index_warmup_tokens=100 if tokens < 100 else 0)
        _, report = model.forward(p, batch.tokens, bias, env, stage)
        assert isinstance(report.attention, Tensor)
        losses.append(report.attention.item())
    alone = attrs.evolve(c, num_layers=2, attention=sections.Mixed(pattern="ab", a=latent, b=section()))
    _, report = model.forward(attrs.evolve(p, blocks=p.blocks[:2]), batch.tokens, bias[:1], shapes.env(alone), alone)
    assert isinstance(report.attention, Tensor)
    assert report.attention.item() == pytest.approx(losses[1], rel=1e-9)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_objective_has_the_mean_of_the_attentions_loss() -> None:
    """Of three layers, the first of them dense; each of two sequences of eleven tokens counts."""
    c = composed()
    p, batch, bias, env = shapes.parameters(c), shapes.batch(c), shapes.router_bias(c), shapes.env(c)
    numbers: dict[str, Any] = {"num_targets": torch.tensor(18), "num_sequences": 2, "chunk": 8}
    loss, nll, report = model.objective(p, batch, bias, env, c, **numbers)
    parts: list[Tensor] = []

    def attend(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        o, of_layer = dsa.attend_dsa(*arguments, **keywords)
        parts.append(of_layer)
        return o, of_layer

    ops = attrs.evolve(env.ops, attention=attrs.evolve(env.ops.attention, attend=attend))
    model.objective(p, batch, bias, attrs.evolve(env, ops=ops), c, **numbers)
    assert len(parts) == 3
    expected = nll / 18 + c.moe.sequence_balance * report.imbalance.sum() / 2 + torch.stack(parts).sum() / 22
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_composed_model_learns_and_so_does_the_indexer(warmup: int) -> None:
    c = composed(index_warmup_tokens=warmup)
    p, batch, env = shapes.parameters(c, dtype=torch.float32), shapes.batch(c, positions=24), environment(c, 24)
    optimizer = torch.optim.AdamW([leaf for _, leaf in tree.leaves(p)], lr=1e-2)
    bias, losses = shapes.router_bias(c, dtype=torch.float32), list[tuple[float, float]]()
    for step in range(30):
        loss, nll, report = model.objective(
            p, batch, bias, env, c, num_targets=(batch.targets >= 0).sum(), num_sequences=2, chunk=16
        )
        loss.backward()
        gradients = [leaf.grad for _, leaf in tree.leaves(p.blocks[0].attention)]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        if step == 10:  # the attention stays, and the indexer comes nearer
            leaves = [leaf for path, leaf in tree.leaves(p) if "indexer" in path]
            optimizer = torch.optim.AdamW(leaves, lr=1e-2)
        optimizer.step()
        for _, leaf in tree.leaves(p):
            leaf.grad = None
        assert isinstance(report.attention, Tensor)
        losses.append((nll.item() / 44, report.attention.item()))
    assert losses[10][0] < losses[0][0] - 1
    assert losses[-1][1] < 0.7 * losses[10][1]


def test_a_packed_document_of_a_model_reads_as_if_alone() -> None:
    c = composed()
    p, tokens = shapes.parameters(c), shapes.batch(c, sequences=1, positions=30).tokens
    env = environment(c, 30)
    env = Env(env.ops, table(section(), 30), env.kind)
    start = torch.zeros(1, 30, dtype=torch.int32)
    begins = (0, 1, 5, 18)
    for begin in begins:
        start[:, begin:] = begin

    def hidden(tokens: Tensor, start: Tensor | tuple[()] = ()) -> Tensor:
        return model.forward(p, tokens, shapes.router_bias(c), env, c, start)[0]

    found = hidden(tokens, start)
    for begin, end in zip(begins, (*begins[1:], 30), strict=True):
        torch.testing.assert_close(found[:, begin:end], hidden(tokens[:, begin:end]), rtol=0, atol=1e-12)
