"""What a run reports while it trains: lines on the screen and in metrics.rank0.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import attrs

from nmoe.config import Config
from nmoe.effects.device import gpu, process
from nmoe.effects.parallel.exchange import Exchange
from nmoe.effects.record.log import Log
from nmoe.effects.record.monitor import Monitor
from nmoe.effects.terminal import say
from nmoe.effects.train import resume
from nmoe.effects.train.evaluate import Held
from nmoe.effects.train.step import Metrics, State, learning_rates, tokens_per_step
from nmoe.pure.data.stages import Stream
from nmoe.pure.model.route import health
from nmoe.pure.units import duration, quantity


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

    def step(self, state: State, metrics: Metrics, seconds: Mapping[str, float], steps: int) -> tuple[int, int]:
        """Report the last step; times are means over the `steps` since the previous report.

        returns  (non-finite steps in all, in a row)
        """
        train = self.config.train
        busy = sum(value for name, value in seconds.items() if name != "validation") / steps
        rate = tokens_per_step(self.config) / busy
        mfu = rate * self.flops / (self.rt.world * self.rt.peak_flops)
        if self.monitor is None:
            return self._own(state, metrics, seconds, steps)
        rates = learning_rates(self.config, state.tokens)
        loss, norm = metrics.loss.item(), metrics.grad_norm.item()
        load = metrics.load.cpu()
        shape = health(load)
        held = gpu.memory_bytes(self.rt.device)
        skipped, in_row = int(metrics.skipped.item()), int(metrics.skipped_in_row.item())
        elapsed = time.monotonic() - self.began
        first = self.config.model.num_dense_layers
        fields = dict(
            step=state.step,
            elapsed_s=elapsed,
            tokens_global=state.tokens,
            tokens_local=self._tokens_local(state),
            loss=loss,
            auxiliary_loss=metrics.auxiliary_loss.item(),
            **{f"lr/{group}": value for group, value in rates.items()},
            grad_norm=norm,
            update_norm=metrics.update_norm.item(),
            nonfinite_steps=skipped,
            tokens_per_s=rate,
            mfu=mfu,
            memory_bytes=held,
            **self._sent(metrics, busy),
            step_s=busy,
            **{f"time/{name}_s": value / steps for name, value in seconds.items() if name != "validation"},
            experts={
                "layer": list(range(first, self.config.model.num_layers)),
                "max_over_mean": shape.max_over_mean.tolist(),
                "cv": shape.cv.tolist(),
                "dead": shape.dead.tolist(),
                "entropy": metrics.entropy.tolist(),
                "bias_min": state.router_bias.amin(-1).tolist(),
                "bias_max": state.router_bias.amax(-1).tolist(),
            },
        )
        self.log.metrics(**fields)
        self.monitor.step(fields, load)
        eta = elapsed / (state.step - self.first_step) * (train.steps - state.step)
        # a dense model has no experts to balance
        worst = shape.max_over_mean.tolist()
        balance = f"bal {max(worst):.2f}  dead {int(shape.dead.sum().item())}  " if worst else ""
        say(
            f"step {state.step:>{len(str(train.steps))}}/{train.steps}  {100 * state.step / train.steps:5.1f} %  "
            f"loss {loss:.4f}  gnorm {norm:.3f}  lr {rates['dense']:.1e}  {quantity(rate)} tok/s  "
            f"mfu {100 * mfu:.1f} %  mem {quantity(held, 'B')}  {balance}eta {duration(eta)}"
        )
        return skipped, in_row

    def mixture(self, planned: Stream, state: State) -> None:
        """Say what will be read: enough to know what any later step has read of each source."""
        self.log.event(
            "mixture",
            step=state.step,
            cursor=state.cursor,
            batch_size=self.config.train.batch_size,
            sequence_length=self.config.train.sequence_length,
            sources=[{"name": source.name, "windows": source.windows} for source in planned.ingredients],
            stages=[{"name": stage.name, "windows": list(stage.quotas)} for stage in planned.stages],
        )

    def _own(self, state: State, metrics: Metrics, seconds: Mapping[str, float], steps: int) -> tuple[int, int]:
        """What this rank alone knows. Writes: its metrics."""
        parts = {f"time/{name}_s": value / steps for name, value in seconds.items() if name != "validation"}
        busy = sum(parts.values())
        self.log.metrics(
            step=state.step,
            elapsed_s=time.monotonic() - self.began,
            tokens_local=self._tokens_local(state),
            memory_bytes=gpu.memory_bytes(self.rt.device),
            **self._sent(metrics, busy),
            step_s=busy,
            **parts,
        )
        return int(metrics.skipped.item()), int(metrics.skipped_in_row.item())

    def _tokens_local(self, state: State) -> int:
        """Tokens this rank has read, in all attempts."""
        return resume.count_tokens(self.first_tokens, state.tokens, self.rt.world)[self.rt.rank]

    def _sent(self, metrics: Metrics, step_s: float) -> dict[str, float]:
        """Bytes this rank wrote into the memory of others in the last step, and that over the mean time of a step."""
        if self.exchange is None:
            return {}
        num_bytes = int(metrics.sent.item())
        return {"exchange/bytes": num_bytes, "exchange/bandwidth": num_bytes / step_s}

    def settle(self) -> None:
        """Wait for what is written aside. Raises: InputError when it could not be written."""
        if self.monitor is not None:
            self.monitor.settle()

    def validation(self, step: int, held: Held) -> None:
        """Report a validation."""
        if self.monitor is None:
            return
        numbers = {"validation/loss": held.loss, "validation/bits_per_byte": held.bits_per_byte}
        self.log.metrics(step=step, elapsed_s=time.monotonic() - self.began, **numbers)
        self.log.event("validation", step=step, loss=held.loss, bits_per_byte=held.bits_per_byte, tokens=held.tokens)
        say(
            f"step {step}  validation loss {held.loss:.4f} nats  {held.bits_per_byte:.4f} bits/byte  "
            f"{held.tokens} tokens"
        )
