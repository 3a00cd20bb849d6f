"""`nmoe plan` for several GPUs, as somebody reads it who decides whether to rent them."""

from __future__ import annotations

import json
import re

import attrs
import pytest

from nmoe.cli import main
from nmoe.cli import plan as scale
from nmoe.config import Config, load, preset
from nmoe.errors import InputError
from tests.configs import ROOT
from tests.test_cli import nmoe, refused

DSV3 = load(ROOT / "configs" / "dsv3.toml", {}, ()).config


def over(experts: int | None, config: Config = DSV3) -> Config:
    """With the experts over so many GPUs; None: over the best number."""
    return attrs.evolve(config, parallel=attrs.evolve(config.parallel, experts=experts))


def shown(
    capsys: pytest.CaptureFixture[str], *, gpus: int, hosts: int | None = None, experts: int | None = None
) -> str:
    fits = gpus == 256 and experts is None
    assert scale.main(over(experts), gpus, hosts, "h200", 0.4, False) == (not fits), "a script reads whether it fits"
    return capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "hosts"), [(256, 32), (128, None), (64, 16), (8, 1), (2, None)])
def test_one_screen_tells_all(capsys: pytest.CaptureFixture[str], gpus: int, hosts: int | None) -> None:
    lines = shown(capsys, gpus=gpus, hosts=hosts).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    names = [line[:15].strip() for line in lines if line[:15].strip()]
    beyond = ["once a host"] if gpus > 8 else []
    expected = [
        "machine",
        "EP size",
        "taken",
        *(["to fit"] if gpus < 256 else []),
        "exchange",
        *beyond,
        "gradients",
        "parameters",
        "a step",
        "time",
    ]
    # the links of the plan are not what its transport between hosts reaches
    ends = [*expected, "other sizes", "links", "assumed", *(["transport"] if beyond else [])]
    assert names[names.index("machine") :] == ends
    assert ("between hosts" in "\n".join(lines)) == (gpus > 8)


def test_the_screen_and_the_numbers_agree(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, gpus=256, hosts=32)
    assert scale.main(DSV3, 256, 32, "h200", 0.4, True) == 0
    numbers = json.loads(capsys.readouterr().out)
    taken = numbers["taken"]
    assert taken in numbers["choices"] and taken in numbers["sizes"]
    arrangement = taken["arrangement"]
    assert f"EP size {arrangement['expert_ranks']} of 256 GPUs, on " in text
    step = re.search(r"^a step +([\d.]+) s = ([\d.]+) s compute \+ ([\d.]+) s exchanges", text, re.MULTILINE)
    assert step is not None
    told = [float(each) for each in step.groups()]
    assert told == pytest.approx([taken["step_s"], taken["compute_s"], taken["exchange_s"]], rel=0.005)
    assert numbers["seconds"] == pytest.approx(numbers["tokens"] / taken["tokens_per_second"])
    assert taken["step_s"] == pytest.approx(
        sum(taken[key] for key in ("compute_s", "exchange_s", "reduce_exposed_s", "gather_exposed_s"))
    )
    # 256, and half as often down to one host; twice as many would not divide the batch
    assert [each["arrangement"]["gpus"] for each in numbers["sizes"]] == [256, 128, 64, 32, 16, 8]
    assert sum(each["fits"] for each in numbers["choices"]) == text.split("other sizes")[0].count(" fits ") * 2


def test_experts_can_be_placed_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, gpus=256, hosts=32, experts=8)
    assert re.search(r"^taken +EP size 8 of 256 GPUs, on 1 host, .*: DOES NOT FIT into 141 GB$", text, re.MULTILINE)
    assert re.search(r"^exchange +dispatch 186 MB in its host: 540 us, 232 a step", text, re.MULTILINE)
    assert "copies" not in text


def test_one_gpu_exchanges_nothing_and_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, gpus=1)
    assert "exchange" not in text
    assert text.splitlines()[-2:] == [
        "machine        1 H200: DOES NOT FIT into 141 GB",
        "to fit         plan for more GPUs or larger ones",
    ]
    moonlet = load(ROOT / "configs" / "moonlet.toml", {}, ()).config
    assert scale.main(moonlet, 1, None, "h200", 0.4, False) == 0
    assert capsys.readouterr().out.endswith("machine        1 H200: fits into 141 GB\n")
    assert scale.main(moonlet, 1, None, "h100", 0.4, False) == 1
    changes = 'lower train.microbatch_size, or write train.recompute = "full", or plan for more GPUs or larger ones'
    assert capsys.readouterr().out.splitlines()[-1] == f"to fit         {changes}"


def test_a_cpu_gets_no_time_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """It was planned as an H200: 57.4 M tokens/s, done in 0:00:00, of a run that takes minutes."""
    config = load(ROOT / "configs" / "quickstart.toml", {}, ()).config
    assert scale.main(config, 1, None, "h200", 0.4, False) == 0
    text = capsys.readouterr().out
    assert text.endswith("time           not planned on a CPU: `nmoe run` measures the machine and says it\n")
    assert "tokens/s" not in text and "H200" not in text


def test_a_run_that_ends_before_its_decay_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for steps, says in (("100", 1), ("740", 0)):
        config = load(ROOT / "configs" / "quickstart.toml", {}, (f"--train.steps={steps}",)).config
        assert scale.main(config, 1, None, "h200", 0.4, False) == 0
        assert capsys.readouterr().out.count("schedule       the run ends at 204,800 tokens, before its decay") == says


@pytest.mark.parametrize(
    ("gpus", "hosts", "experts", "machine", "mfu", "expected"),
    [
        (256, 30, None, "h200", 0.4, ("--hosts: expected a divisor of the 256 GPUs, got 30; .*",)),
        (256, 0, None, "h200", 0.4, ("--hosts: .*, got 0; .*",)),
        (8, 16, None, "h200", 0.4, ("--hosts: .*, got 16; .*",)),
        (12, None, None, "h200", 0.4, ("--gpus: expected a multiple of the 8 GPUs of a host, got 12; .*",)),
        (256, 32, 6, "h200", 0.4, (r"parallel.experts: .* of 256 experts, .*, one of 1, 8, 16, .*, 256, got 6; .*",)),
        (256, 32, 0, "h200", 0.4, ("parallel.experts: .*, got 0; .*",)),
        (256, 32, 512, "h200", 0.4, ("parallel.experts: .*, got 512; .*",)),
        (8, 1, None, "b200", 0.4, ("--machine: expected one of h100, h200, got b200; .*",)),
        (0, 7, None, "a100", float("nan"), ("--gpus: .*", "--mfu: .*", "--machine: .*")),
        (8, -1, None, "h200", 1.5, ("--mfu: .*, got 1.5; .*", "--hosts: .*, got -1; .*")),
    ],
)
def test_options_that_make_no_sense(
    gpus: int, hosts: int | None, experts: int | None, machine: str, mfu: float, expected: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as error:
        scale.main(over(experts), gpus, hosts, machine, mfu, False)
    told = str(error.value).splitlines()
    assert len(told) == len(expected)
    for line, pattern in zip(told, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_the_command() -> None:
    done = nmoe("plan", "configs/dsv3.toml", "--gpus", "256", "--hosts", "32", "--machine", "h100", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["taken"]["fits"] is False
    assert json.loads(done.stdout)["machine"]["memory"] == 80e9
    refused(
        nmoe("plan", "configs/dsv3.toml", "--gpus", "256", "--hosts", "7"),
        "--hosts: expected a divisor of the 256 GPUs, got 7; every host has as many GPUs as another",
    )


@pytest.mark.parametrize("name", ["moonlet", "moonlet-16b", "moonlight", "dsv2", "dsv3"])
def test_a_preset_says_the_memory_that_its_plan_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = re.sub(r"\n# ?", " ", preset.path_of(name).read_text())
    found = re.search(r"(\d+) GB (?:each )?in (?:use|all)|activations (\d+) GB", said)
    assert found is not None
    main(["plan", name, "--json"])
    memory = json.loads(capsys.readouterr().out)["taken"]["memory"]
    assert float(found[1] or found[2]) == pytest.approx(memory / 1e9, abs=1)


def test_a_batch_that_the_gpus_do_not_share_is_fitted() -> None:
    nearest = r"write train\.microbatch_size = 1, or pass --fit to `nmoe run` and `nmoe plan`"
    refused(nmoe("plan", "moonlet", "--gpus", "8"), rf".*: train\.batch_size: expected a multiple .*; {nearest}")
    done = nmoe("plan", "moonlet", "--gpus", "8", "--fit")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("fitted         train.microbatch_size: 8 -> 1\n")
    assert "1 microbatch of 1 x 4096 a rank" in done.stdout
    as_json = nmoe("plan", "moonlet", "--gpus", "8", "--fit", "--json")
    assert json.loads(as_json.stdout)["microbatches"] == 1
    assert as_json.stderr == "fitted         train.microbatch_size: 8 -> 1\n"
