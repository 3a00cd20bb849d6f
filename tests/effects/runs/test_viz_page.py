"""The page in a browser: every view, values as in the files, live lines, phone and dark, many runs, restarts."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from playwright.sync_api import Browser, Page, expect

from nmoe.config import dump
from nmoe.soak import soak
from tests.effects.runs import viz_runs as runs
from tests.effects.runs.viz_page import drawn, goto, opened
from tests.effects.runs.viz_server import Server, serving

VIEWS = ("runs", "charts", "experts", "timing", "gpus", "evaluations", "events", "configs", "samples", "data")
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_opens_without_an_error(browser: Browser, server: Server, theme: str) -> None:
    with opened(browser, f"{server.url}/?one=finished&theme={theme}") as page:
        for key, view in enumerate(VIEWS, 1):
            page.keyboard.press(str(key % 10))
            expect(page.locator("nav a.here")).to_have_text(re.compile(view, re.I))
            drawn(page)
            expect(page.locator("main .problem")).to_have_count(0)
        assert page.locator("html").get_attribute("data-theme") == theme
        page.go_back()
        expect(page.locator("nav a.here")).to_have_text("Samples")


def test_the_table_shows_what_the_files_say(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?sort=name&dir=up&col=optim.peak_lr") as page:
        expect(page.locator("table.runs tbody tr")).to_have_count(6)
        told = {row.inner_text().split("\t")[1].strip(): row.inner_text() for row in page.locator("tbody tr").all()}
        assert list(told) == sorted(told)
        finished = told["finished"]
        for part in (
            "✓ finished",
            "200 / 200",
            f"{runs.loss(200):.4f}",
            f"{runs.loss(200) + 0.1:.4f}",
            "204.8 k",
            "31.0 %",
        ):
            assert part in finished, part
        assert "! 1" in finished and "0.0010" in finished
        assert "NaN" in told["nan-loss"] and "✕ failed" in told["nan-loss"]
        assert "crashed" in told["crashed"] and "1 bad line" in told["crashed"]
        assert "? lost" in told["lost"] and "not started" in told["bare"]
        assert "● running" in told["resumed"] and "↻ 2" in told["resumed"]


def test_runs_are_found_grouped_and_chosen_by_keys_and_address(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as page:
        expect(page.locator("table.runs")).to_be_visible()
        page.keyboard.press("/")
        page.keyboard.type("fin")
        expect(page.locator("table.runs tbody tr")).to_have_count(1)
        page.get_by_label("group by").select_option("status")
        expect(page.locator("tr.group")).to_have_text("status = finished 1")
        page.get_by_role("link", name="finished").click()
        expect(page.locator("nav a.here")).to_have_text("Charts")
        assert "run=finished" in page.url and "view=charts" in page.url and "find=fin" in page.url


def test_the_menu_adds_the_column_that_is_chosen(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?sort=name&dir=up&find=finished") as page:
        page.get_by_label("add a column").select_option("optim.peak_lr")
        expect(page.locator("thead th.extra")).to_contain_text("optim.peak_lr")
        expect(page.locator("table.runs tbody tr td").nth(-3)).to_have_text("0.0010")
        assert "col=optim.peak_lr" in page.url
        page.get_by_role("button", name="remove column optim.peak_lr").click()
        expect(page.locator("thead th.extra")).to_have_count(0)


def test_charts_show_the_last_value_and_zoom_by_dragging(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=charts&run=finished") as page:
        loss = page.get_by_role("figure", name="loss", exact=True)
        expect(loss.locator(".chart-note")).to_have_text(f"{runs.loss(200):.4f}")
        expect(page.get_by_role("figure", name="mfu").locator(".chart-note")).to_have_text("31.0 %")
        over = loss.locator(".u-over")
        box = over.bounding_box()
        assert box is not None
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.5, y)
        expect(loss.locator(".tip")).to_contain_text("finished")
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, y, steps=5)
        page.mouse.up()
        page.wait_for_url(re.compile("low=1"))
        expect(page.get_by_role("button", name="undo zoom")).to_be_visible()
        page.keyboard.press("r")
        page.wait_for_url(lambda url: "low=" not in url)
        with page.expect_download() as saved:
            loss.get_by_role("button", name="save loss as PNG").click()
        assert saved.value.suggested_filename == "loss.png"
        assert saved.value.path().read_bytes().startswith(b"\x89PNG")
        with page.expect_download() as table:
            page.get_by_role("link", name="CSV").click()
        assert table.value.path().read_text().startswith("run,rank,attempt,step")


def test_experts_gpus_timing_configs_and_events_are_those_of_the_run(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=experts&run=finished&step=100") as page:
        expect(page.locator("#experts-about")).to_have_text("3 MoE layers, 16 experts, top 2")
        expect(page.locator("#load-step")).to_have_text("100")
        assert page.get_by_label("run", exact=True).input_value() == "finished"
        assert page.get_by_label("layer", exact=True).input_value() == "1"
        expect(page.locator("#experts-latest tbody tr")).to_have_count(3)
        dead = [cell.inner_text() for cell in page.locator("#experts-latest tbody tr td:nth-child(4)").all()]
        assert dead == ["0", "1", "0"]
        heat = page.get_by_role("img", name="Load of each expert at step 100")
        heat.scroll_into_view_if_needed()
        box = heat.bounding_box()
        assert box is not None
        heat.hover(position={"x": 46 + (box["width"] - 54) * (5.5 / 16), "y": 4 + (box["height"] - 34) * 0.5})
        note = page.locator(".chart.wide .chart-note").first
        expect(note).to_contain_text(f"layer 2, expert 5: {runs.loads(100, 2)[5]} rows")
        goto(page, f"{server.url}/?view=gpus&run=finished")
        expect(page.locator("#gpus tbody tr")).to_have_count(2)
        assert "91 %\t65.5 GB of 85.9 GB" in page.locator("#gpus tbody tr").nth(1).inner_text()
        expect(page.locator("#gpus-about")).to_contain_text("driver 570.86.15, CUDA 12.8")
        goto(page, f"{server.url}/?view=timing&run=finished")
        expect(page.locator("#slowest")).to_have_text("rank 2")
        goto(page, f"{server.url}/?view=configs&run=finished&run=resumed")
        expect(page.locator("#configs tbody tr")).to_have_text([re.compile(r"optim\.peak_lr\s*0\.001\s*0\.002")])
        goto(page, f"{server.url}/?view=events&run=finished&event=alert")
        expect(page.locator("#events tbody tr")).to_have_text([re.compile("layer 2: 1 expert is dead")])
        goto(page, f"{server.url}/?view=samples&run=finished")
        expect(page.locator(".sample pre")).to_contain_text("<b>not markup</b>")
        assert page.locator(".sample pre b").count() == 1, "the prompt alone is bold: a text is never markup"


def test_a_mixture_is_shown_against_what_was_read(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=data&run=finished") as page:
        rows = page.locator("#mixture tbody tr")
        expect(rows).to_have_count(5)
        told = [[cell.strip() for cell in row.inner_text().split("\t")] for row in rows.all()]
        assert told[0] == ["pretrain", "web", "75.0 %", "75.0 %", "115.2 k", "115.2 k", "", "0.18"]
        assert told[4][:3] == ["anneal", "books", "20.0 %"] and told[4][4] == "25.6 k"
        width = rows.nth(2).locator(".bar span").evaluate("node => node.style.width")
        assert width == "40%", "400 of 1000 windows of the second stage"


def test_a_phone_scrolls_down_and_never_sideways(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?one=finished", viewport={"width": 360, "height": 740}) as page:
        expect(page.locator("table.runs")).to_be_visible()
        for view in VIEWS:
            goto(page, f"{server.url}/?view={view}&one=finished&run=finished&run=resumed")
            expect(page.locator("main")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
        page.get_by_role("button", name="list of runs").click()
        expect(page.locator("aside")).to_be_in_viewport()
        page.get_by_role("checkbox", name="crashed").check()
        assert "run=crashed" in page.url


def test_a_new_line_is_on_the_screen_without_a_reload(browser: Browser, tmp_path: Path) -> None:
    folder = runs.folder(tmp_path, "live")
    with serving(tmp_path) as server, opened(browser, f"{server.url}/?view=charts&run=live&tags=loss") as page:
        expect(page.locator("nav a.here")).to_have_text("Charts")
        runs.append(folder / "metrics.rank0.jsonl", (runs.metrics(step) for step in range(1, 21)))
        note = page.get_by_role("figure", name="loss").locator(".chart-note")
        expect(note).to_have_text(f"{runs.loss(20):.4f}")
        for step in range(21, 25):
            runs.append(folder / "metrics.rank0.jsonl", [runs.metrics(step, loss=step + 0.5)])
            expect(note).to_have_text(f"{step}.5000")


def test_no_runs_no_folder_and_then_a_run(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path / "none") as server, opened(browser, server.url) as page:
        expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
        runs.finished(tmp_path / "none", steps=10)
        expect(page.locator("table.runs tbody tr")).to_have_count(1)
        shutil.rmtree(tmp_path / "none" / "finished")
        expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()


def test_a_field_that_the_contract_lacks_is_an_error_on_the_page(browser: Browser, server: Server) -> None:
    page = browser.new_page()

    def without_loss(route: Any) -> None:
        answer = route.fetch()
        told = answer.json()
        for run in told["runs"]:
            run.pop("loss")
        route.fulfill(response=answer, body=json.dumps(told))

    page.route("**/api/runs?*", without_loss)
    page.goto(server.url)
    expect(page.get_by_role("alert")).to_contain_text("api: Run has a field loss, got none")
    page.close()


@pytest.mark.long
def test_a_server_that_ends_is_told(browser: Browser, tmp_path: Path) -> None:
    runs.finished(tmp_path, steps=5)
    page = browser.new_page()
    with serving(tmp_path) as server:
        page.goto(server.url)
        expect(page.locator("table.runs")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("the server does not answer")
    page.close()


def many(root: Path, count: int, steps: int) -> None:
    """Runs with a few tags and many steps."""
    source = random.Random(1)
    for number in range(count):
        folder = runs.folder(root, f"run-{number:03d}", steps=steps, lr=0.001 * (1 + number % 5))
        shift = source.random()
        with open(folder / "metrics.rank0.jsonl", "w") as file:
            for step in range(1, steps + 1):
                loss = 2 + shift + 6 / (1 + step / 300) + 0.1 * source.random()
                line = {"attempt": 1, "step": step, "elapsed_s": step / 2, "tokens_global": step * 1024}
                file.write(json.dumps(line | {"loss": loss, "grad_norm": shift, "tokens_per_s": 8000.0}) + "\n")
        runs.append(folder / "events.jsonl", [runs.event("end", steps, step=steps, status="finished")])


def opening(browser: Browser, address: str, until: Callable[[Page], None]) -> float:
    """Seconds from asking for a page until `until` returns."""
    with opened(browser, "about:blank") as page:
        began = time.monotonic()
        page.goto(address)
        until(page)
        return time.monotonic() - began


@pytest.mark.long
def test_three_hundred_runs_open(browser: Browser, tmp_path: Path) -> None:
    many(tmp_path, 300, 10_000)
    with serving(tmp_path) as server:
        while server.json("/api/runs")["runs"][0]["step"] is None or len(server.json("/api/runs")["runs"]) < 300:
            time.sleep(1)
        with opened(browser, server.url) as page:
            page.locator("table.runs tbody tr").nth(299).wait_for(timeout=120_000)
            expect(page.locator(".progress")).to_have_count(0, timeout=300_000)
        table = opening(browser, server.url, lambda page: page.locator("table.runs tbody tr").nth(299).wait_for())
        charts = opening(browser, f"{server.url}/?view=charts&run=*&tags=loss", drawn)
        points = opening(browser, f"{server.url}/?view=charts&run=run-000&run=run-001&tags=loss", drawn)
        print(f"\n300 runs of 10,000 steps: table {table:.2f} s, chart of all {charts:.2f} s, of two {points:.2f} s")


@pytest.mark.long
def test_sixteen_thousand_points_are_drawn(browser: Browser, tmp_path: Path) -> None:
    many(tmp_path, 4, 4000)
    with serving(tmp_path) as server:
        server.json("/api/runs")
        path = "/api/series?" + "&".join(f"run=run-{n:03d}" for n in range(4)) + "&tag=loss&points=4000"
        answer = server.json(path)
        assert sum(len(curve["mean"]) for curve in answer["curves"]) == 16_000
        with opened(browser, f"{server.url}/?view=charts&tags=loss") as page:
            drawn(page)
            took = page.evaluate(
                """async ([answer]) => {
                    const { ordinary } = await import("/static/axes.js");
                    const data = [answer.x, ...answer.curves.map((curve) => curve.mean)];
                    const node = document.querySelector("main").appendChild(document.createElement("div"));
                    const series = [{}, ...answer.curves.map((curve) => ({stroke: "#0072b2"}))];
                    const times = [];
                    for (let turn = 0; turn < 3; turn += 1) {
                        const began = performance.now();
                        ordinary(answer.curves.map(({mean, low, high}) => ({values: mean, low, high})));
                        const plot = new uPlot({width: 800, height: 230, series}, data, node);
                        await new Promise((done) => queueMicrotask(done));
                        plot.ctx.getImageData(0, 0, 1, 1);
                        times.push(performance.now() - began);
                        plot.destroy();
                    }
                    return Math.min(...times);
                }""",
                [answer],
            )
        print(f"\n16,000 points are drawn in {took:.0f} ms")


def training(folder: Path, corpus: Path, steps: int) -> list[str]:
    """The command of a small training that tells every step and saves every twenty."""
    config = soak.training(folder, "seen", corpus, steps)
    log = attrs.evolve(config.log, heartbeat_every_s=0.2, telemetry_every_s=0.5)
    checkpoint = attrs.evolve(config.checkpoint, every=20, on_error="stop")
    config = attrs.evolve(config, log=log, checkpoint=checkpoint)
    (folder / "seen.toml").write_text(dump(config))
    return [sys.executable, "-m", "nmoe", "run", str(folder / "seen.toml")]


STEPS = 1500


@pytest.mark.long
def test_the_command_of_a_checkpoint_resumes_from_it(tmp_path: Path, sources: Path) -> None:
    subprocess.run(training(tmp_path, sources, 60), cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    with serving(tmp_path / "runs") as server:
        saved = server.json("/api/checkpoints?run=seen")["checkpoints"]
    assert [each["step"] for each in saved] == [60, 40, 20]
    command = [sys.executable, "-m", *shlex.split(saved[1]["command"])]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    lines = map(json.loads, (tmp_path / "runs" / "seen" / "metrics.rank0.jsonl").read_text().splitlines())
    steps = {(line["step"], line["attempt"]) for line in lines if "loss" in line}
    assert steps == {(step, 1 if step <= 40 else 2) for step in range(1, 61)}


@pytest.mark.long
def test_a_run_is_killed_and_resumed_while_it_is_looked_at(browser: Browser, tmp_path: Path, sources: Path) -> None:
    """Two real attempts of one training: stopped, continued, killed, resumed, seen at each moment."""
    command = training(tmp_path, sources, STEPS)
    metrics = tmp_path / "runs" / "seen" / "metrics.rank0.jsonl"

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]

    with serving(tmp_path / "runs") as server, opened(browser, server.url) as page:
        status, step = page.locator("table.runs tbody tr .status"), page.locator("table.runs .bar-text")
        expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as first:
            expect(status).to_have_text("● running")
            expect(step).to_have_text(re.compile(rf"^\d{{2,}} / {STEPS}"))
            os.kill(first.pid, signal.SIGSTOP)
            expect(status).to_have_text("? lost")
            os.kill(first.pid, signal.SIGCONT)
            expect(status).to_have_text("● running")
            first.kill()
        expect(status).to_have_text("✕ crashed")
        reached = lines()[-1]["step"]
        assert 20 < reached < STEPS
        expect(step).to_have_text(f"{reached} / {STEPS}")
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as second:
            expect(status).to_have_text("● running")
            assert second.wait(timeout=240) == 0
        expect(status).to_have_text("✓ finished")
        expect(step).to_have_text(f"{STEPS} / {STEPS}")
        expect(page.locator("table.runs tbody tr")).to_contain_text("↻ 2")

        told = {line["step"]: line["loss"] for line in lines() if "loss" in line}
        series = server.json("/api/series?run=seen&tag=loss&points=4000")
        assert series["x"] == [float(each) for each in range(1, STEPS + 1)], "one unbroken curve"
        assert series["curves"][0]["mean"] == [told[each] for each in range(1, STEPS + 1)]
        hours = server.json("/api/series?run=seen&tag=loss&points=4000&x=time")["x"]
        assert hours == sorted(hours) and len(set(hours)) == STEPS, "time goes on where the attempt before ended"
        (resumed,) = [each for each in server.json("/api/events?run=seen")["events"] if each["event"] == "resume"]
        assert 0 < reached - resumed["x"] <= 20 and {line["attempt"] for line in lines()} == {1, 2}
        goto(page, f"{server.url}/?view=charts&run=seen&tags=loss")
        note = page.get_by_role("figure", name="loss", exact=True).locator(".chart-note")
        expect(note).to_have_text(f"{told[STEPS]:.4f}")
