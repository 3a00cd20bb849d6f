"""The sections of the kinds of attention."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import attrs

from nmoe.config.setting import MOST_POSITIONS, MOST_TOKENS, WIDEST, setting


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


@attrs.frozen(kw_only=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    kind: ClassVar[str] = "mla"

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


@attrs.frozen(kw_only=True)
class Gqa:
    """Grouped-query attention, optionally in a window and with learned sinks (gpt-oss, arXiv:2508.10925)."""

    kind: ClassVar[str] = "gqa"

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
    rope_theta: float = setting("base of the rotation frequencies", default=10000.0, above=1, high=1e12)
    yarn: Yarn | None = setting("position range extension; absent: none", default=None)


@attrs.frozen(kw_only=True)
class Kda:
    """Kimi delta attention, a linear recurrence by the gated delta rule (Kimi Linear, arXiv:2510.26692)."""

    kind: ClassVar[str] = "kda"

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


@attrs.frozen(kw_only=True)
class Nsa:
    """Native sparse attention: compressed blocks, selected blocks and a window (arXiv:2502.11089)."""

    kind: ClassVar[str] = "nsa"

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


Single = Mla | Gqa | Kda | Nsa | Dsa
"""One kind of attention, of a whole model or of some of its layers."""


@attrs.frozen(kw_only=True)
class Mixed:
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
