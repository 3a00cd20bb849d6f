"""The sections of the kinds of attention, each with the rules that its keys have to fulfil together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import attrs

from nmoe.config.setting import MOST_POSITIONS, MOST_TOKENS, WIDEST, divides, setting
from nmoe.config.toml import shown

GQA_HEAD_DIMS = (64, 128)
"""Channels of a head that the kernels of `gqa` take."""

KDA_HEAD_DIMS = (64, 128)
"""Channels of a head that the kernels of `kda` take."""

DSA_MOST: Mapping[str, int] = MappingProxyType(
    {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_num_heads": 64, "index_head_dim": 128}
)
"""The largest sizes that the kernels of `dsa` take: those of DeepSeek-V3.2."""

NSA_MOST: Mapping[str, int] = MappingProxyType({"head_dim": 192, "v_head_dim": 128, "selected_block": 64})
"""The largest sizes that the kernels of `nsa` take: those of the paper."""

NSA_GROUP = 64
"""Query heads of a group that the kernels of `nsa` take."""


class Rules:
    """What the checks ask the section of an attention; problems in the form of `check.validate`.

    has_kernels      whether a GPU has kernels of this kind; false: it runs the reference, plain torch
    problems         (where, num_layers, max_positions) -> what is wrong with the section at the path `where`
    kernel_problems  (where, step) -> sizes that the kernels do not take, which read multiples of `step` elements
    has_stages       whether the mathematics of a step changes during the run, which a recorded step cannot do
    """

    has_kernels: ClassVar[bool] = False

    def problems(self, where: str, num_layers: int, max_positions: int) -> Iterator[str]:
        yield from ()

    def kernel_problems(self, where: str, step: int) -> Iterator[str]:
        yield from ()

    def has_stages(self) -> bool:
        return False


@attrs.frozen(kw_only=True)
class Yarn:
    """Position range extension (YaRN, arXiv:2309.00071) as DeepSeek-V2/V3 use it."""

    factor: float = setting("extended range / original range", above=1, high=1e6)
    original_positions: int = setting(
        "position range of the model before extension", unit="positions", low=1, high=MOST_POSITIONS
    )
    beta_fast: float = setting("rotations above which a frequency is kept", default=32.0, low=1e-6, high=1e6)
    beta_slow: float = setting("rotations below which a frequency is interpolated", default=1.0, low=1e-6, high=1e6)
    mscale: float = setting("magnitude coefficient of the rotation table", default=1.0, low=1e-3, high=1e2)
    mscale_all_dim: float = setting("magnitude coefficient of the attention scale", default=1.0, low=1e-3, high=1e2)
    truncate: bool = setting(
        "whether the ramp between the two begins and ends at whole channel pairs; false: gpt-oss", default=True
    )

    def problems(self, where: str, max_positions: int) -> Iterator[str]:
        """What is wrong with the table at `where`, in the form of `check.validate`."""
        if self.original_positions * self.factor < max_positions:
            yield (
                f"{where}.factor: expected original_positions * factor at least max_positions = {max_positions}, "
                f"got {self.original_positions} * {shown(self.factor)}; raise factor or lower max_positions"
            )
        if self.beta_slow >= self.beta_fast:
            yield (
                f"{where}.beta_slow: expected below beta_fast = {shown(self.beta_fast)}, got "
                f"{shown(self.beta_slow)}; lower beta_slow"
            )


@attrs.frozen(kw_only=True)
class Mla(Rules):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    kind: ClassVar[str] = "mla"
    has_kernels: ClassVar[bool] = True

    num_heads: int = setting("attention heads", low=1, high=WIDEST, shapes=True)
    q_lora_rank: int | None = setting(
        "low rank of the query; absent: a plain projection", default=None, low=1, high=WIDEST, shapes=True
    )
    kv_lora_rank: int = setting("low rank of keys and values", low=1, high=WIDEST, shapes=True)
    qk_nope_head_dim: int = setting(
        "channels of a head's query and key without position", low=1, high=WIDEST, shapes=True
    )
    qk_rope_head_dim: int = setting(
        "channels of a head's query and key that are rotated; even", low=2, high=WIDEST, shapes=True
    )
    v_head_dim: int = setting("channels of a head's value", low=1, high=WIDEST, shapes=True)
    rope_theta: float = setting("base of the rotation frequencies", default=10000.0, above=1, high=1e12)
    yarn: Yarn | None = setting("position range extension; absent: none", default=None)
    position: Literal["none"] | None = setting(
        '"none": the channels meant for it are not rotated (Kimi Linear); absent: they are', default=None
    )

    def problems(self, where: str, num_layers: int, max_positions: int) -> Iterator[str]:
        yield from _odd(where, "qk_rope_head_dim", self.qk_rope_head_dim)
        if self.yarn is not None and self.position == "none":
            yield f'{where}.yarn: expected no table beside position = "none", got one; remove one of the two'
        if self.yarn is not None:
            yield from self.yarn.problems(f"{where}.yarn", max_positions)

    def kernel_problems(self, where: str, step: int) -> Iterator[str]:
        yield from self.wide_heads(where, step, ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))

    def wide_heads(self, where: str, step: int, keys: tuple[str, ...]) -> Iterator[str]:
        """Sizes of a head that the kernels of `mla` do not take."""
        for key in keys:
            size = getattr(self, key)
            if size % step or not step <= size <= 256:
                yield (
                    f"{where}.{key}: expected a multiple of {step} up to 256 for the attention kernels, got "
                    f"{size}; write {min(256, max(step, -(-size // step) * step))}"
                )


@attrs.frozen(kw_only=True)
class Gqa(Rules):
    """Grouped-query attention, optionally in a window and with learned sinks (gpt-oss, arXiv:2508.10925)."""

    kind: ClassVar[str] = "gqa"
    has_kernels: ClassVar[bool] = True

    num_heads: int = setting("query heads", low=1, high=WIDEST, shapes=True)
    num_kv_heads: int = setting("heads of keys and values; divides num_heads", low=1, high=WIDEST, shapes=True)
    head_dim: int = setting("channels of a head, all of them rotated; even", low=2, high=WIDEST, shapes=True)
    window: int | None = setting(
        "keys a query sees, its own included; absent: all", unit="tokens", default=None, low=1, high=MOST_POSITIONS
    )
    global_every: int | None = setting(
        "every so many-th layer sees all keys whatever the window; absent: none does", default=None, low=2, high=1000
    )
    sinks: bool = setting(
        "whether each query head has a learned logit in the softmax's denominator", default=False, shapes=True
    )
    biases: bool = setting("whether both projections have biases", default=False, shapes=True)
    rope_theta: float = setting("base of the rotation frequencies", default=10000.0, above=1, high=1e12)
    yarn: Yarn | None = setting("position range extension; absent: none", default=None)

    def problems(self, where: str, num_layers: int, max_positions: int) -> Iterator[str]:
        yield from _odd(where, "head_dim", self.head_dim)
        if self.yarn is not None:
            yield from self.yarn.problems(f"{where}.yarn", max_positions)
        yield from _groups(where, self.num_heads, self.num_kv_heads)
        if self.global_every is not None and self.window is None:
            yield (
                f"{where}.global_every: expected a window beside it, got {self.global_every} alone; write window or "
                "remove global_every, without a window every layer is global"
            )
        if self.global_every is not None and self.global_every > num_layers:
            yield (
                f"{where}.global_every: expected at most num_layers = {num_layers}, got {self.global_every}; lower "
                "it, or remove it for a window in every layer"
            )

    def kernel_problems(self, where: str, step: int) -> Iterator[str]:
        yield from _head_dim(where, self.head_dim, GQA_HEAD_DIMS)


@attrs.frozen(kw_only=True)
class Kda(Rules):
    """Kimi delta attention, a linear recurrence by the gated delta rule (Kimi Linear, arXiv:2510.26692)."""

    kind: ClassVar[str] = "kda"
    has_kernels: ClassVar[bool] = True

    num_heads: int = setting("attention heads", low=1, high=WIDEST, shapes=True)
    head_dim: int = setting(
        "channels of a head's query, key and value, and low rank of the gates", low=1, high=WIDEST, shapes=True
    )
    conv_size: int = setting(
        "tokens that the short convolutions weigh, its own included",
        unit="tokens",
        default=4,
        low=1,
        high=64,
        shapes=True,
    )
    decay_limit: float | None = setting(
        "largest decay of a channel at a token, by the bounded gate; absent: the softplus gate, without a bound",
        unit="nats",
        default=None,
        above=0,
        high=1e3,
    )

    def kernel_problems(self, where: str, step: int) -> Iterator[str]:
        yield from _head_dim(where, self.head_dim, KDA_HEAD_DIMS)


@attrs.frozen(kw_only=True)
class Nsa(Rules):
    """Native sparse attention: compressed blocks, selected blocks and a window (arXiv:2502.11089)."""

    kind: ClassVar[str] = "nsa"
    has_kernels: ClassVar[bool] = True

    num_heads: int = setting("query heads", low=1, high=WIDEST, shapes=True)
    num_kv_heads: int = setting(
        "heads of keys and values, one selection each; divides num_heads", low=1, high=WIDEST, shapes=True
    )
    head_dim: int = setting(
        "channels of a head's query and key, all of them rotated; even", low=2, high=WIDEST, shapes=True
    )
    v_head_dim: int = setting("channels of a head's value", low=1, high=WIDEST, shapes=True)
    compressed_block: int = setting(
        "tokens that one compressed key stands for", unit="tokens", default=32, low=1, high=MOST_POSITIONS, shapes=True
    )
    compressed_stride: int = setting(
        "tokens from one compressed block to the next; divides compressed_block and selected_block",
        unit="tokens",
        default=16,
        low=1,
        high=MOST_POSITIONS,
    )
    selected_block: int = setting("tokens of a selected block", unit="tokens", default=64, low=1, high=MOST_POSITIONS)
    num_selected: int = setting(
        "blocks that a query reads, the first, its own and the one before included",
        unit="blocks",
        default=16,
        low=3,
        high=MOST_POSITIONS,
    )
    window: int = setting(
        "last tokens that a query reads, its own included", unit="tokens", default=512, low=1, high=MOST_POSITIONS
    )
    rope_theta: float = setting("base of the rotation frequencies", default=10000.0, above=1, high=1e12)

    def problems(self, where: str, num_layers: int, max_positions: int) -> Iterator[str]:
        yield from _odd(where, "head_dim", self.head_dim)
        yield from _groups(where, self.num_heads, self.num_kv_heads)
        for key in ("compressed_block", "selected_block"):
            size = getattr(self, key)
            if not divides(self.compressed_stride, size):
                yield (
                    f"{where}.compressed_stride: expected a divisor of {key} = {size}, got {self.compressed_stride}; "
                    "choose blocks of whole strides"
                )

    def kernel_problems(self, where: str, step: int) -> Iterator[str]:
        for key, most in NSA_MOST.items():
            size, steps = getattr(self, key), 1 if key == "selected_block" else step
            if size % steps or size > most:
                multiple = "at most" if steps == 1 else f"a multiple of {steps} up to"
                yield (
                    f"{where}.{key}: expected {multiple} {most} for the attention kernels, got {size}; write "
                    f"{min(most, -(-size // steps) * steps)}"
                )
        if self.num_heads > NSA_GROUP * self.num_kv_heads:
            yield (
                f"{where}.num_kv_heads: expected at least a {NSA_GROUP}th of num_heads = {self.num_heads} for the "
                f"attention kernels, got {self.num_kv_heads}; raise it"
            )


@attrs.frozen(kw_only=True)
class Dsa(Mla):
    """Sparse latent attention to the keys that an indexer finds (DeepSeek-V3.2)."""

    kind: ClassVar[str] = "dsa"

    q_lora_rank: int = setting("low rank of the query, which the indexer reads", low=1, high=WIDEST, shapes=True)
    index_num_heads: int = setting("heads of the indexer", low=1, high=WIDEST, shapes=True)
    index_head_dim: int = setting(
        "channels of a head of the indexer; the first qk_rope_head_dim are rotated",
        low=2,
        high=WIDEST,
        shapes=True,
    )
    index_top_k: int = setting("keys that a query reads", unit="tokens", default=2048, low=1, high=MOST_POSITIONS)
    index_loss: float = setting(
        "weight of the indexer's loss: KL divergence of its scores from the attention",
        default=1.0,
        above=0,
        high=1e3,
    )
    index_warmup_tokens: int = setting(
        "tokens of the run during which every query reads all keys and the indexer learns from them",
        unit="tokens",
        default=0,
        low=0,
        high=MOST_TOKENS,
    )

    def problems(self, where: str, num_layers: int, max_positions: int) -> Iterator[str]:
        yield from super().problems(where, num_layers, max_positions)
        if self.index_head_dim < self.qk_rope_head_dim:
            yield (
                f"{where}.index_head_dim: expected at least qk_rope_head_dim = {self.qk_rope_head_dim}, got "
                f"{self.index_head_dim}; raise it, that many channels are rotated"
            )
        if self.position == "none":
            yield f'{where}.position: expected no value, got "none"; remove it, the indexer\'s queries are rotated'

    def kernel_problems(self, where: str, step: int) -> Iterator[str]:
        if self.has_stages():  # the dense one runs on the kernels of `mla`
            yield from self.wide_heads(where, step, ("qk_nope_head_dim", "v_head_dim"))
        for key, most in DSA_MOST.items():
            size, steps = getattr(self, key), 1 if key == "index_num_heads" else step
            if size % steps or size > most:
                multiple = "at most" if steps == 1 else f"a multiple of {steps} up to"
                yield (
                    f"{where}.{key}: expected {multiple} {most} for the attention kernels, got {size}; write "
                    f"{min(most, -(-size // steps) * steps)}"
                )

    def has_stages(self) -> bool:
        return self.index_warmup_tokens > 0


Single = Mla | Gqa | Kda | Nsa | Dsa
"""One kind of attention, of a whole model or of some of its layers."""


@attrs.frozen(kw_only=True)
class Mixed(Rules):
    """Other kinds of attention, by layer: each of `a`, `b`, `c` is a table as of `model.attention` with one kind."""

    kind: ClassVar[str] = "mixed"

    pattern: str = setting("letter of each layer's table, from the first on, repeated over the layers", shapes=True)
    last: str = setting("letters of the last layers, whatever the pattern has there", default="", shapes=True)
    a: Single = setting("attention of the layers a")
    b: Single = setting("attention of the layers b")
    c: Single | None = setting("attention of the layers c; absent: none", default=None)

    def parts(self) -> dict[str, Any]:
        """Letter -> section of the tables there are."""
        return {letter: part for letter in ("a", "b", "c") if (part := getattr(self, letter)) is not None}

    def letters(self, num_layers: int) -> str:
        """The letter of each layer."""
        repeated = self.pattern * (num_layers // len(self.pattern) + 1)
        return repeated[: num_layers - len(self.last)] + self.last

    def problems(self, where: str, num_layers: int, max_positions: int) -> Iterator[str]:
        letters = ", ".join(self.parts())
        for key, value in (("pattern", self.pattern), ("last", self.last)):
            if set(value) - set(self.parts()):
                yield (
                    f"{where}.{key}: expected letters of the tables {letters}, got {shown(value)}; choose others "
                    "or write their tables"
                )
            if len(value) > num_layers:
                yield (
                    f"{where}.{key}: expected at most num_layers = {num_layers} letters, got {len(value)}; shorten it"
                )
        if not self.pattern:
            yield f'{where}.pattern: expected a letter at least, got ""; write "ab" for layers a and b in turn'
        elif max(len(self.pattern), len(self.last)) <= num_layers:
            for letter in sorted(set(self.parts()) - set(self.letters(num_layers))):
                yield (
                    f"{where}.{letter}: expected a layer with it, got none of {num_layers}; write its letter into "
                    "pattern or last, or remove the table"
                )
        for letter, part in self.parts().items():
            yield from part.problems(f"{where}.{letter}", num_layers, max_positions)


def _odd(where: str, key: str, rotated: int) -> Iterator[str]:
    if rotated % 2:
        yield (
            f"{where}.{key}: expected an even number, got {rotated}; write {rotated + 1}, channels are rotated in pairs"
        )


def _head_dim(where: str, size: int, taken: tuple[int, ...]) -> Iterator[str]:
    if size not in taken:
        yield (
            f"{where}.head_dim: expected {' or '.join(map(str, taken))} for the attention kernels, got {size}; write "
            "one of them"
        )


def _groups(where: str, num_heads: int, num_kv_heads: int) -> Iterator[str]:
    if not divides(num_kv_heads, num_heads):
        yield (
            f"{where}.num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}; "
            "choose groups of the same size"
        )
