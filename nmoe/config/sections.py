"""The sections of a config: frozen values, one class a TOML table, one line a key.

A field's metadata holds what the reference page, the JSON Schema and the range checks say of it. A class with a `kind`
is one way to fill its field: the table names it with the key `kind`, and a further way is one more class in the field's
union. This file knows nothing of files, torch or the model's mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import attrs

from nmoe.config.attention import Dsa as Dsa
from nmoe.config.attention import Gqa as Gqa
from nmoe.config.attention import Kda as Kda
from nmoe.config.attention import Mixed, Single
from nmoe.config.attention import Mla as Mla
from nmoe.config.attention import Nsa as Nsa
from nmoe.config.attention import Yarn as Yarn
from nmoe.config.precision import Precision as Precision
from nmoe.config.setting import MOST_POSITIONS, MOST_SECONDS, MOST_STEPS, MOST_TOKENS, WIDEST, setting
from nmoe.config.watch import Eval as Eval
from nmoe.config.watch import Log as Log
from nmoe.config.watch import Sample as Sample
from nmoe.config.watch import Validation as Validation

MOST_SEQUENCES = 2**20


@attrs.frozen(kw_only=True)
class Moe:
    """Routed and shared experts of a block, router as in DeepSeek-V3 (arXiv:2412.19437), or V2 for a softmax;
    biases and the clamped SwiGLU as in gpt-oss (arXiv:2508.10925)."""

    num_experts: int = setting("routed experts", low=2, high=2**16, shapes=True)
    top_k: int = setting("routed experts a token", low=1, high=2**16)
    num_shared_experts: int = setting(
        "experts that see each token, as one wide MLP", default=0, low=0, high=2**10, shapes=True
    )
    intermediate_size: int = setting("hidden width of one expert", low=1, high=WIDEST, shapes=True)
    num_groups: int = setting("groups the experts fall into", default=1, low=1, high=2**16)
    top_k_groups: int = setting("groups a token may choose from", default=1, low=1, high=2**16)
    route_scale: float = setting("factor on the routing weights", default=1.0, low=1e-6, high=1e6)
    normalize: bool = setting(
        "whether a token's routing weights sum to route_scale; false: each is its score times route_scale", default=True
    )
    score: Literal["sigmoid", "softmax"] = setting(
        "a token's affinity to an expert: a sigmoid of its own, groups ranked by their two best experts; or a softmax "
        "over all experts, groups ranked by their best",
        default="sigmoid",
    )
    biases: bool = setting(
        "whether the router's logits and both products of a routed expert have biases", default=False, shapes=True
    )
    swiglu_limit: float | None = setting(
        "largest gate, and value of either sign, of a routed expert's clamped SwiGLU: (value + 1) * gate * "
        "sigmoid(swiglu_alpha * gate), as gpt-oss has it; absent: gate * sigmoid(gate) * value",
        default=None,
        above=0,
        high=1e6,
    )
    swiglu_alpha: float = setting("factor in the sigmoid of the clamped SwiGLU", default=1.702, above=0, high=1e3)
    balance: Literal["sign", "quantile"] = setting(
        "how the router bias evens out expert load: steps of one size, or quantiles of the scores", default="sign"
    )
    bias_update_rate: float | None = setting(
        'step of the router bias; balance = "sign"; absent: 3.5 over the steps of the run, at least 0.001 and at most '
        "0.01, so that the bias comes as far in a short run",
        default=None,
        low=0,
        high=1e3,
    )
    bias_decay: float = setting(
        'share of the router bias that a step keeps beside the new quantile; balance = "quantile"',
        default=0.5,
        low=0,
        high=0.9999,
    )
    sequence_balance: float = setting("weight of the sequence-wise auxiliary loss", default=0.0001, low=0, high=1e3)

    def plain(self) -> bool:
        """Whether a routed expert is a SwiGLU without biases."""
        return not self.biases and self.swiglu_limit is None


@attrs.frozen(kw_only=True)
class Mtp:
    """Multi-token prediction: the tokens after the next one, as in DeepSeek-V3 (arXiv:2412.19437, section 2.2)."""

    depth: int = setting(
        "further tokens a position predicts, each by a block of its own", unit="tokens", low=1, high=64, shapes=True
    )
    weight: float = setting("weight of the mean loss of all depths", default=0.3, low=0, high=1e3)
    later_weight: float = setting("the same once switch_tokens are read", default=0.1, low=0, high=1e3)
    switch_tokens: int | None = setting(
        "tokens of the run from which on later_weight holds; absent: never",
        default=None,
        unit="tokens",
        low=0,
        high=MOST_TOKENS,
    )

    def weight_at(self, tokens: int) -> float:
        """Weight of the step that brings the run to `tokens` tokens."""
        return self.weight if self.switch_tokens is None or tokens <= self.switch_tokens else self.later_weight


@attrs.frozen(kw_only=True)
class Model:
    """Shape of the network."""

    vocab_size: int = setting(
        "rows of the embedding; at least the tokenizer's", unit="tokens", low=2, high=WIDEST * 2**4, shapes=True
    )
    hidden_size: int = setting("width of the residual stream", low=1, high=WIDEST, shapes=True)
    num_layers: int = setting("blocks, dense and MoE together", low=1, high=1000, shapes=True)
    num_dense_layers: int = setting(
        "leading blocks with a dense MLP; num_layers: a dense model", default=1, low=0, high=1000, shapes=True
    )
    intermediate_size: int = setting("hidden width of a dense MLP", low=1, high=WIDEST, shapes=True)
    max_positions: int = setting(
        "longest sequence the rotation table serves", unit="positions", low=1, high=MOST_POSITIONS
    )
    norm_eps: float = setting("epsilon of RMSNorm", default=1e-6, low=1e-20, high=1)
    embedding_scale: float = setting("factor on the embedding (muP input scale)", default=1.0, low=1e-6, high=1e6)
    logit_scale: float = setting("factor on the logits (muP output scale)", default=1.0, low=1e-6, high=1e6)
    attention: Single | Mixed = setting("attention of every block; `kind` chooses the table's keys")
    moe: Moe = setting("MoE layer of every block after the dense ones")
    mtp: Mtp | None = setting("multi-token prediction; absent: the next token alone", default=None)

    def depth(self) -> int:
        """Blocks of multi-token prediction."""
        return 0 if self.mtp is None else self.mtp.depth

    def mixtures(self) -> tuple[int, ...]:
        """Numbers of the layers with experts, counted from 0; those of multi-token prediction come after the last."""
        last = self.num_layers + self.depth() if self.num_dense_layers < self.num_layers else 0
        return tuple(range(self.num_dense_layers, last))

    def attentions(self) -> dict[str, Any]:
        """Path of its table -> section of each attention: one, or those of a mixed one."""
        if isinstance(self.attention, Mixed):
            return {f"model.attention.{letter}": part for letter, part in self.attention.parts().items()}
        return {"model.attention": self.attention}


@attrs.frozen(kw_only=True)
class Stdlib:
    """Python's own standard library as a corpus, with a tokenizer trained on it."""

    kind: ClassVar[str] = "stdlib"

    tokenizer_size: int = setting(
        "vocabulary of the tokenizer, end-of-text included", unit="tokens", default=4096, low=257, high=WIDEST * 2**4
    )


@attrs.frozen(kw_only=True)
class Shards:
    """A folder of prepared shards."""

    kind: ClassVar[str] = "shards"

    path: str = setting(
        "folder that holds manifest.json; on resume its path may change, its content not", identity=False
    )


@attrs.frozen(kw_only=True)
class Mixture:
    """Several folders of prepared shards, as a mixture file says."""

    kind: ClassVar[str] = "mixture"

    path: str = setting("mixture file (see configs/mixtures)")
    flow: Literal["dev", "research", "ablation", "proxy", "full_train"] = setting(
        "which of the file's flows: how many tokens, in which stages", default="dev"
    )


@attrs.frozen(kw_only=True)
class Data:
    """What is read."""

    source: Stdlib | Shards | Mixture = setting("where tokens come from; `kind` chooses the table's keys")
    prefetch: int = setting(
        "batches that a thread reads ahead; 0: none", unit="batches", default=2, low=0, high=64, identity=False
    )


@attrs.frozen(kw_only=True)
class Group:
    """The optimizer of one group of parameters."""

    lr: float = setting("peak learning rate", low=1e-30, high=1e30)
    optimizer: Literal["adamw", "muon"] = setting(
        "update rule of the group's hidden matrices; all else is updated by AdamW", default="adamw", shapes=True
    )
    beta1: float = setting("decay of the first moment", default=0.9, low=0, high=0.9999)
    beta2: float = setting("decay of the second moment", default=0.95, low=0, high=0.999999)
    eps: float = setting("added to the root of the second moment", default=1e-8, low=1e-20, high=1)
    momentum: float = setting("decay of Muon's momentum", default=0.95, low=0, high=0.9999)


@attrs.frozen(kw_only=True)
class Optim:
    """Optimizer: one group a table, decay and clip for all."""

    dense: Group = setting("embedding, attention, norms, dense and shared MLPs, head")
    expert: Group = setting("routed experts")
    router: Group = setting("router matrices")
    weight_decay: float = setting("decoupled decay of the parameters that decay", default=0.1, low=0, high=1e3)
    clip_norm: float = setting("largest global gradient norm", default=1.0, low=1e-20, high=1e20)
    qk_clip: float | None = setting(
        "largest attention score; a head above it has its query and key weights scaled down; absent: no limit",
        default=None,
        above=0,
        high=1e6,
    )
    muon_heads: Literal["apart"] | None = setting(
        "Muon orthogonalises each head of a projection by itself; absent: all heads as one matrix", default=None
    )

    def optimizers(self) -> dict[str, str]:
        """Group -> update rule of its hidden matrices."""
        return {name: getattr(self, name).optimizer for name in ("dense", "expert", "router")}


@attrs.frozen(kw_only=True)
class Schedule:
    """Learning rate over tokens: linear warm-up, constant, cosine decay, then the floor; in tokens or shares."""

    warmup_tokens: int = setting("length of the linear warm-up", unit="tokens", default=0, low=0, high=MOST_TOKENS)
    hold_tokens: int | None = setting(
        "length at the peak; needed unless decay is given", unit="tokens", default=None, low=0, high=MOST_TOKENS
    )
    decay_tokens: int | None = setting(
        "length of the cosine decay; needed unless decay is given", unit="tokens", default=None, low=0, high=MOST_TOKENS
    )
    floor: float = setting("last learning rate / peak", default=0.1, low=0, high=1)
    warmup: float | None = setting(
        "warm-up as a share of the run, in the place of warmup_tokens", default=None, low=0, high=1
    )
    decay: float | None = setting(
        "last share of the run that decays, in the place of hold_tokens and decay_tokens",
        default=None,
        low=0,
        high=1,
    )

    def in_tokens(self, total: int) -> Schedule:
        """The same schedule of a run of `total` tokens without shares; one that has none is as it was.

        The hold is what warm-up and decay leave; it is below 0 where they do not fit.
        """
        if self.warmup is None and self.decay is None:
            return self
        warmup = self.warmup_tokens if self.warmup is None else int(self.warmup * total)
        if self.decay is None:
            return attrs.evolve(self, warmup=None, warmup_tokens=warmup)
        decay = int(self.decay * total)  # rounded down, as the warm-up: shares that sum to 1 fit
        return Schedule(warmup_tokens=warmup, hold_tokens=total - warmup - decay, decay_tokens=decay, floor=self.floor)


OTHER_FORMS: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("schedule", "warmup"): ("warmup_tokens",),
        ("schedule", "warmup_tokens"): ("warmup",),
        ("schedule", "decay"): ("hold_tokens", "decay_tokens"),
        ("schedule", "hold_tokens"): ("decay",),
        ("schedule", "decay_tokens"): ("decay",),
    }
)
"""Keys that a later layer of the config replaces by giving the same thing in another form."""


@attrs.frozen(kw_only=True)
class Train:
    """The step."""

    steps: int = setting("optimizer steps", low=1, high=MOST_STEPS, identity=False)
    batch_size: int = setting("sequences a step, over all ranks", unit="sequences", low=1, high=MOST_SEQUENCES)
    microbatch_size: int = setting(
        "sequences a rank holds at once", unit="sequences", low=1, high=MOST_SEQUENCES, identity=False
    )
    sequence_length: int = setting("tokens a sequence", unit="tokens", low=1, high=MOST_POSITIONS)
    loss_chunk: int = setting(
        "tokens whose logits are held at once", unit="tokens", default=1024, low=1, high=MOST_POSITIONS, identity=False
    )
    z_loss: float = setting("weight of the squared log-partition", default=0.0, low=0, high=1e3)
    document_mask: bool = setting(
        "attention sees only its own document, positions count from the document's start", default=False
    )
    deterministic: bool = setting(
        "same bits from run to run; false: attention's backward by cuDNN, whose query gradient is not repeatable",
        default=True,
        identity=False,
    )
    recompute: Literal["none", "cheap", "full"] = setting(
        "what the backward pass computes again instead of keeping: nothing, norms and activations, or whole blocks",
        default="none",
        identity=False,
    )
    graph: bool = setting("replay the step as one CUDA graph", default=False, identity=False)
    max_nonfinite_steps: int = setting(
        "non-finite steps in a row that stop the run", default=3, low=1, high=MOST_STEPS, identity=False
    )
    skip_spikes: float | None = setting(
        "loss or gradient norm above the median of 128 steps that skips a step; absent: none is",
        default=None,
        unit="deviations",
        above=0,
        high=1e6,
    )
    resume: str = setting(
        '"auto": resume the run folder of this name; "never": a new folder; else the run (name or path) or checkpoint',
        default="auto",
        identity=False,
    )
    warm_start: str | None = setting(
        "run, by name or path, checkpoint or weights file whose weights a new run starts with; absent: by the seed",
        default=None,
        identity=False,
    )


@attrs.frozen(kw_only=True)
class Checkpoint:
    """When the state is saved, and what is kept. One more is saved at the end and at a stop."""

    every: int = setting(
        "steps between saves; 0: not by steps", default=500, unit="steps", low=0, high=MOST_STEPS, identity=False
    )
    minutes: float = setting(
        "time between saves; 0: not by time", default=0.0, unit="minutes", low=0, high=MOST_SECONDS / 60, identity=False
    )
    keep_last: int = setting("newest checkpoints kept", default=2, low=1, high=MOST_STEPS, identity=False)
    keep_every: int = setting(
        "checkpoints at multiples of it are kept for good; 0: none",
        default=0,
        unit="steps",
        low=0,
        high=MOST_STEPS,
        identity=False,
    )
    keep_best: bool = setting("whether the one of the lowest validation loss is kept", default=True, identity=False)
    on_error: Literal["stop", "continue"] = setting(
        "what a failed save does at the next save point; the state in memory is sound either way",
        default="stop",
        identity=False,
    )
    asynchronous: bool = setting("whether steps continue while a checkpoint is written", default=True, identity=False)
    grace_s: float = setting(
        "time from SIGTERM or SIGUSR1 to the end of the process",
        default=30.0,
        unit="seconds",
        above=0,
        high=MOST_SECONDS,
        identity=False,
    )


@attrs.frozen(kw_only=True)
class Parallel:
    """How many processes, one a GPU, and how they share the work."""

    ranks: int = setting("processes; `nmoe run` starts so many", default=1, low=1, high=2**16, identity=False)
    experts: int | None = setting(
        "neighbouring ranks that share out the experts; absent: all", default=None, low=1, high=2**16, identity=False
    )
    capacity: float = setting(
        "rows the experts of a rank can take, over the mean; more end the run; 0: the worst that can come",
        default=2.0,
        low=0,
        high=1e6,
        identity=False,
    )
    dedup: bool = setting(
        "whether a token goes once to a rank that holds several of its experts", default=True, identity=False
    )
    transport: Literal["peer", "proxy", "nvshmem"] = setting(
        "how rows reach the ranks that hold their experts: by memory that a host's ranks share, to other hosts by a "
        "thread and TCP, slowly, or by puts of NVSHMEM, which no network has carried yet",
        default="peer",
        identity=False,
    )
    timeout_s: float = setting(
        "time without a step after which a run has hung; longer than a save or a validation batch takes",
        default=300.0,
        unit="s",
        low=1,
        high=MOST_SECONDS,
        identity=False,
    )

    def room(self) -> float:
        """`capacity`, decoded: infinity for 0."""
        return self.capacity or math.inf


@attrs.frozen(kw_only=True)
class Memory:
    """What torch's allocators may do; set once, before anything is on the GPU. A run on the CPU takes none of it."""

    expandable_segments: bool = setting(
        "whether the GPU's segments grow in place: less fragmentation where sizes differ from step to step",
        default=False,
        identity=False,
    )
    fraction: float = setting(
        "share of the GPU's memory that this process may take", default=1.0, above=0.0, high=1.0, identity=False
    )
    pinned: bool = setting(
        "whether batches and checkpoints pass through pinned host memory; without it the host waits for each copy",
        default=True,
        identity=False,
    )


@attrs.frozen(kw_only=True)
class Run:
    """One run: where it happens and where it is written."""

    device: Literal["cpu", "cuda"] = setting("where it computes", identity=False)
    kernels: Literal["triton", "torch"] = setting(
        "what a GPU computes with: nmoe's kernels, or plain torch: slower, on compute capability 8.0 and newer",
        default="triton",
        identity=False,
    )
    seed: int = setting("seed of initial values and data order", default=0, low=0)
    root: str = setting("folder of run folders", default="runs", identity=False)
    name: str | None = setting(
        "name of the run folder; absent: config name and start time", default=None, identity=False
    )


@attrs.frozen(kw_only=True)
class Config:
    """A whole config."""

    model: Model = setting("shape of the network")
    precision: Precision = setting("number formats")
    data: Data = setting("what is read")
    optim: Optim = setting("optimizer")
    schedule: Schedule = setting("learning rate over tokens")
    train: Train = setting("the step")
    validation: Validation = setting("loss on held-out documents")
    run: Run = setting("where it happens")
    parallel: Parallel = setting("how many processes", default=attrs.Factory(Parallel))
    memory: Memory = setting("what the allocators may do", default=attrs.Factory(Memory))
    sample: Sample = setting("texts it writes while it trains", default=attrs.Factory(Sample))
    eval: Eval = setting("tasks that are scored while it trains", default=attrs.Factory(Eval))
    checkpoint: Checkpoint = setting("when the state is saved, and what is kept", default=attrs.Factory(Checkpoint))
    log: Log = setting("what is printed and written", default=attrs.Factory(Log))

    def tokens(self) -> int:
        """Tokens that all ranks read in all steps."""
        return self.train.steps * self.train.batch_size * self.train.sequence_length

    def sign_step(self) -> float:
        """Step of the router bias where `balance` is "sign".

        DeepSeek-V3 (arXiv:2412.19437, section 4.2) has 0.001 for a run of many thousands. In 350 steps that leaves the
        busiest expert at 3.5 times the mean, 0.01 at 1.5, with the same loss (docs/records).
        """
        given = self.model.moe.bias_update_rate
        return 3.5 / min(max(self.train.steps, 350), 3500) if given is None else given

    def schedule_in_tokens(self) -> Schedule:
        """The schedule with its shares as tokens of this run."""
        return self.schedule.in_tokens(self.tokens())
