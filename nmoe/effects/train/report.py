"""What a run reports while it trains: lines on the screen and in metrics.rank0.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import attrs

from nmoe.config import Config
from nmoe.effects.device import gpu, process
from nmoe.effects.parallel.exchange import Exchange
from nmoe.effects.record import scores as score_file
from nmoe.effects.record.log import Log
from nmoe.effects.record.monitor import Monitor
from nmoe.effects.terminal import say, table, width
from nmoe.effects.train import resume
from nmoe.effects.train.evaluate import Held
from nmoe.effects.train.step import Metrics, State, learning_rates, tokens_per_step
from nmoe.pure.data.stages import Stream
from nmoe.pure.evals.score import Score, rows
from nmoe.pure.model.route import health
from nmoe.pure.units import duration
from nmoe.pure.watch import metrics as schema

ETA_RANK, PERCENT_RANK = 3, 10
"""Ranks, as `schema.Metric.rank`, of what a step's line has beside its metrics."""


@attrs.frozen(kw_only=True)
class Report:
    """Turns the metrics of steps into lines: on the screen and in metrics.rank0.jsonl."""

    config: Config
    rt: process.Runtime
    log: Log
    flops: int  # of training, a token
    began: float  # monotonic seconds
    monitor: Monitor | None  # None: not the first rank, which reports what all have in common
    first_step: int  # steps taken before this attempt
    first_tokens: Sequence[int]  # tokens read by each rank before this attempt
    exchange: Exchange | None = None

    def step(self, state: State, metrics: Metrics, seconds: Mapping[str, float], steps: int) -> tuple[int, int, int]:
        """Report the last step; times are means over the `steps` since the previous report.

        returns  (spikes skipped in all, non-finite steps in all, in a row)
        """
        train, spikes = self.config.train, int(metrics.spikes.item())
        skipped, in_row = int(metrics.skipped.item()), int(metrics.skipped_in_row.item())
        rank = self._rank(state, metrics, seconds, steps)
        if self.monitor is None:
            self.log.metrics(**schema.fields(rank))
            return spikes, skipped, in_row
        load = metrics.load.cpu()
        balance = health(load)
        rate = tokens_per_step(self.config) / rank.step_s
        line = schema.Step(
            rank=rank,
            tokens_global=state.tokens,
            loss=metrics.loss.item(),
            mtp_losses={str(depth): loss for depth, loss in enumerate(metrics.mtp.tolist(), 1)},
            auxiliary_loss=metrics.auxiliary_loss.item(),
            rates=learning_rates(self.config, state.tokens),
            grad_norm=metrics.grad_norm.item(),
            update_norm=metrics.update_norm.item(),
            nonfinite_steps=skipped,
            spike_steps=spikes,
            tokens_per_s=rate,
            mfu=rate * self.flops / (self.rt.world * self.rt.peak_flops),
            experts=schema.Experts(
                layer=list(self.config.model.mixtures()),
                max_over_mean=balance.max_over_mean.tolist(),
                cv=balance.cv.tolist(),
                dead=balance.dead.tolist(),
                entropy=metrics.entropy.tolist(),
                bias_min=state.router_bias.amin(-1).tolist(),
                bias_max=state.router_bias.amax(-1).tolist(),
            ),
        )
        fields = schema.fields(line)
        self.log.metrics(**fields)
        self.monitor.step(line, load)
        eta = rank.elapsed_s / (state.step - self.first_step) * (train.steps - state.step)
        step = (0, f"step {state.step:>{len(str(train.steps))}}/{train.steps}")
        percent = (PERCENT_RANK, f"{100 * state.step / train.steps:5.1f} %")
        say(schema.fitting([step, percent, *schema.parts(fields), (ETA_RANK, f"eta {duration(eta)}")], width()))
        return spikes, skipped, in_row

    def mixture(self, planned: Stream, state: State) -> None:
        """Say what will be read: enough to know what any later step has read of each source."""
        self.log.event(
            "mixture",
            step=state.step,
            cursor=state.cursor,
            left_out=[list(stretch) for stretch in planned.left_out],
            batch_size=self.config.train.batch_size,
            sequence_length=self.config.train.sequence_length,
            sources=[{"name": source.name, "windows": source.windows} for source in planned.ingredients],
            stages=[{"name": stage.name, "windows": list(stage.quotas)} for stage in planned.stages],
        )

    def _symmetric_bytes(self) -> int:
        """Memory of a GPU that its peers write into, of which torch's pools do not know; on a CPU it is resident."""
        if self.rt.device.type != "cuda":
            return 0
        return self.rt.ranks.symmetric_bytes() + (0 if self.exchange is None else self.exchange.raw.nbytes)

    def _rank(self, state: State, metrics: Metrics, seconds: Mapping[str, float], steps: int) -> schema.Rank:
        """What this rank alone knows of itself; times are means over the last `steps`."""
        times = {name: value / steps for name, value in seconds.items() if name != gpu.APART}
        step_s = sum(times.values())
        # written into the memory of other ranks in the last step
        sent = None if self.exchange is None else int(metrics.sent.item())
        return schema.Rank(
            step=state.step,
            elapsed_s=time.monotonic() - self.began,
            # in all attempts
            tokens_local=resume.count_tokens(self.first_tokens, state.tokens, self.rt.world)[self.rt.rank],
            memory_bytes=gpu.memory_bytes(self.rt.device) + self._symmetric_bytes(),
            step_s=step_s,
            times=times,
            exchange_bytes=sent,
            exchange_bandwidth=None if sent is None else sent / step_s,
        )

    def settle(self) -> None:
        """Wait for what is written aside. Raises: InputError when it could not be written."""
        if self.monitor is not None:
            self.monitor.settle()

    def validation(self, step: int, held: Held) -> None:
        """Report a validation."""
        if self.monitor is None:
            return
        elapsed_s = time.monotonic() - self.began
        fields = schema.fields(
            schema.Validation(step=step, elapsed_s=elapsed_s, loss=held.loss, bits_per_byte=held.bits_per_byte)
        )
        self.log.metrics(**fields)
        self.log.event("validation", step=step, loss=held.loss, bits_per_byte=held.bits_per_byte, tokens=held.tokens)
        about = [(0, f"step {step}"), *schema.parts(fields), (PERCENT_RANK, f"{held.tokens} tokens")]
        say(schema.fitting(about, width()))

    def evaluation(self, step: int, scores: Mapping[str, Score]) -> None:
        """Report an evaluation: in metrics, as an event, and in the file of scores."""
        if self.monitor is None:
            return
        values = {name: score.value for name, score in scores.items()}
        line = schema.Evaluation(
            step=step,
            elapsed_s=time.monotonic() - self.began,
            bits={name.removeprefix("bits/"): value for name, value in values.items() if name.startswith("bits/")},
            shares={name: value for name, value in values.items() if not name.startswith("bits/")},
            errors={name: score.error for name, score in scores.items()},
        )
        self.log.metrics(**schema.fields(line))
        self.log.event("evaluation", step=step, scores={name: attrs.asdict(score) for name, score in scores.items()})
        score_file.keep(self.log.folder, scores, step)
        say(table((f"step {step}", "score", "std error", "items"), rows(scores), left=1))
