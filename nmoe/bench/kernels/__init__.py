"""`nmoe bench moe|precision|attention|loss|optimizer|kernels`: each kernel beside another one, in one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from nmoe.bench.kernels import attention, dsa, gate, gqa, kda, loss, moe, nsa, optimizer, tuner
from nmoe.bench.kernels.meter import REPEATS, Meter, Row, Taken, Variant, gpu_meter, measure
from nmoe.effects import files
from nmoe.effects.device import gpu, ops
from nmoe.effects.terminal import say, table
from nmoe.errors import InputError

HEAD = ("", "forward", "forward+backward", "rate", "of peak", "least moved", "more held", "error", "same", "speed")

KINDS = ("moe", "precision", "attention", "loss", "optimizer")


def kernels(kinds: Sequence[str], jsonl: Path | None) -> int:
    """`nmoe bench kernels` and its parts: `measured`, printed."""
    measured(gpu.to_measure(f"bench {kinds[0] if len(kinds) == 1 else 'kernels'}"), kinds, jsonl)
    return 0


def gated(rows: Path | None, against: Path | None, jsonl: Path | None) -> int:
    """`nmoe bench gate`: 1 when a kernel fell beside its peer, which is named.

    rows     measured earlier, as `kernels` writes them; None: measure now
    against  rows to compare with; None: those that are shipped
    jsonl    also write what is measured there

    Raises:  InputError when there is no GPU to measure on or nothing is known of it, or a file is not one of rows.
    """
    if rows is not None and jsonl is not None:
        raise InputError(f"--jsonl: expected none beside --rows, got {jsonl}; remove one, of rows nothing is measured")
    shipped = gate.ratios(against or gate.SHIPPED)
    if rows is not None:
        found = gate.ratios(rows)
    else:
        device = gpu.to_measure("bench gate", "run it on a machine that has one, or pass --rows FILE")
        gate.shipped_for(torch.cuda.get_device_name(device), shipped)  # before minutes of measuring
        found = gate.by_gpu(measured(device, KINDS, jsonl))
    fell = [
        f"{name}: {line}" for name, now in found.items() for line in gate.slower(gate.shipped_for(name, shipped), now)
    ]
    say("\n".join(fell) or f"no kernel fell by more than {100 * gate.FALL:.0f} % beside its peer")
    return 1 if fell else 0


def measured(device: torch.device, kinds: Sequence[str], jsonl: Path | None) -> list[dict[str, Any]]:
    """Measure on random data and print a table for each case; the rows, each with its machine.

    kinds  of `KINDS`
    jsonl  also write one line a row there

    Raises:  InputError when the file cannot be written.
    """
    if jsonl is not None:
        files.new_file(jsonl, "--jsonl")
    meter = gpu_meter(device)
    machine = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    say(
        f"{machine}; medians of {REPEATS}; a large product reaches {meter.flops / 1e12:.0f} TFLOP/s, a pass "
        f"{meter.bandwidth / 1e9:.0f} GB/s"
    )
    every: list[dict[str, Any]] = []
    for kind in kinds:
        for title, rows in cases(kind, meter):
            say(f"\n{title}\n{table(HEAD, [cells(row) for row in rows], left=1)}")
            written = [{"machine": machine, **attrs.asdict(row)} for row in rows]
            if jsonl is not None:
                with jsonl.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in written)
            every += written
    return every


def cases(kind: str, meter: Meter) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of each case of a kind."""
    device = meter.device
    if kind == "moe":
        for case in moe.CASES:
            operands = moe.Operands.of(case, device)
            title = f"{described(case)}  busiest expert {moe.busiest(case, operands.expert):.1f} x the mean"
            tiles = ops.mixture_tiles(device, case.hidden, case.width)
            yield f"moe  {title}", rows("moe", case, moe.variants(case, operands, tiles), moe.PEER, meter)
    elif kind == "precision":
        for case in moe.CROSSOVER:
            tiles = ops.mixture_tiles(device, case.hidden, case.width)
            both = moe.formats(moe.Operands.of(case, device), tiles)
            yield f"precision  {described(case)}", rows("precision", case, both, moe.OURS, meter)
    elif kind == "attention":
        for case in attention.CASES:
            tiles = ops.mla_tiles(device, case.nope, case.rope, case.value)
            measured = rows("attention", case, attention.variants(case, device, tiles), attention.PEER, meter)
            yield f"attention  {described(case)}", measured
        for case in gqa.CASES:
            tiles = ops.gqa_tiles(device, case.head_dim, *((case.window,) if case.window else ()))
            measured = rows("attention", case, gqa.variants(case, device, tiles), gqa.PEER, meter)
            yield f"attention  {described(case)}", measured
        for case in kda.CASES:
            tiles = ops.kda_tiles(device, case.head_dim)
            measured = rows("attention", case, kda.variants(case, device, tiles), kda.peer(device), meter)
            yield f"attention  {described(case)}", measured
        for case in dsa.CASES:
            tiles = ops.dsa_tiles(device, case.heads, case.rank, case.rope)
            dense = ops.mla_tiles(device, 128, case.rope, 128)
            stage = ops.dsa_dense_tiles(device)
            measured = rows("attention", case, dsa.variants(case, device, tiles, stage, dense), dsa.PEER, meter)
            yield f"attention  {described(case)}", measured
        for case in nsa.CASES:
            tiles = ops.nsa_tiles(device, case.head_dim, case.value)
            dense = ops.mla_tiles(device, case.value, case.head_dim - case.value, case.value)
            measured = rows("attention", case, nsa.variants(case, device, tiles, dense), nsa.PEER, meter)
            yield f"attention  {described(case)}", measured
    elif kind == "loss":
        for case in loss.CASES:
            yield f"loss  {described(case)}", rows("loss", case, loss.variants(case, device), loss.PEER, meter)
    else:
        for case in optimizer.CASES:
            measured = rows("optimizer", case, optimizer.variants(case, device), optimizer.PEER, meter)
            yield f"optimizer  {described(case)}", measured


def described(case: Any) -> str:
    """A case's fields, as the JSONL has them."""
    return "  ".join(f"{name.rstrip('_')} {value}" for name, value in attrs.asdict(case).items())


def rows(what: str, case: Any, variants: Iterator[Variant], peer: str, meter: Meter) -> list[Row]:
    """Every variant measured, beside the peer."""
    measured: list[tuple[Variant, Taken]] = [(variant, measure(variant, meter)) for variant in variants]
    times = {variant.name: taken.both_s for variant, taken in measured}
    built: list[Row] = []
    for variant, taken in measured:
        moved = case.moved_bytes() if variant.moved_bytes is None else variant.moved_bytes
        reached = case.flop() / meter.flops if case.flop() else moved / meter.bandwidth
        is_peer = variant.name == peer
        built.append(
            Row(
                what=what,
                case=described(case),
                variant=variant.name,
                forward_s=taken.forward_s,
                both_s=taken.both_s,
                flop=case.flop(),
                moved_bytes=moved,
                share=reached / taken.both_s,
                extra_bytes=taken.extra_bytes,
                error=taken.error,
                repeats=taken.repeats,
                ratio=None if is_peer else times[peer] / taken.both_s,
                beside=None if is_peer else peer,
            )
        )
    return built


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table, in the order of `HEAD`."""
    if row.flop:
        rate = f"{row.flop / row.both_s / 1e12:.1f} TFLOP/s"
    else:
        rate = f"{row.moved_bytes / row.both_s / 1e9:.0f} GB/s"
    return (
        row.variant,
        "" if row.forward_s is None else f"{1000 * row.forward_s:.3f} ms",
        f"{1000 * row.both_s:.3f} ms",
        rate,
        f"{100 * row.share:.0f} %",
        f"{row.moved_bytes / 1e9:.1f} GB",
        f"{row.extra_bytes / 1e9:.2f} GB",
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.repeats is None else "yes" if row.repeats else "no",
        "(1)" if row.ratio is None else f"{row.ratio:.2f} x",
    )


def tune(sizes: Sequence[str]) -> int:
    """Measure which tiles are fastest, and print a table for `effects/kernels`.

    sizes  of mixtures, as `2048x1408`: hidden size and expert size
    Raises:  InputError for another form of size.
    """
    device = gpu.to_measure("bench kernels --tune")
    parsed: list[tuple[int, int]] = []
    for size in sizes:
        numbers = size.split("x")
        if len(numbers) != 2 or not all(number.isdecimal() and int(number) % 8 == 0 for number in numbers):
            raise InputError(
                f"--size: expected hidden size and expert size, multiples of 8, as 2048x1408, got {size!r}"
            )
        parsed.append((int(numbers[0]), int(numbers[1])))
    seconds = gpu_meter(device).seconds
    for text in tuner.table(device, parsed, lambda call: seconds(call, True)):
        say(text + "\n")
    return 0
