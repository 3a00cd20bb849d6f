"""What the views show, on values: axes, legends, sections, groups, events in words, what lies in a run folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from nmoe.pure.units import quantity
from tests.effects.runs import viz_runs as runs
from tests.effects.runs.viz_page import drawn, goto, opened
from tests.effects.runs.viz_server import Server, serving

VIEWS = (
    *("runs", "charts", "experts", "timing", "gpus", "evaluations", "events", "configs", "samples", "data"),
    *("checkpoints", "console", "compare"),
)


LINES = "(all) => [...new Set(all.map((node) => new Set([...node.getClientRects()].map(({ top }) => top)).size))]"
"""Over how many lines each of some pieces of text reaches."""


TOPS_OF = """(node, wanted) => {
    const texts = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    for (let text = texts.nextNode(); text; text = texts.nextNode()) {
        const at = text.data.indexOf(wanted);
        if (at < 0) continue;
        const range = document.createRange();
        range.setStart(text, at);
        range.setEnd(text, at + wanted.length);
        return new Set([...range.getClientRects()].map(({ top }) => top)).size;
    }
}"""
"""Over how many lines a part of a text reaches."""


def figure(page: Page, name: str) -> Locator:
    """A chart by its whole title."""
    return page.get_by_role("figure", name=name, exact=True)


def ticks(chart: Locator, axis: str) -> list[str]:
    """The texts along an axis of a chart that has been drawn."""
    plot = chart.locator(".plot")
    expect(plot).to_have_attribute("data-drawn", re.compile("."))
    return (plot.get_attribute(f"data-{axis}") or "").split(" | ")


def last_number(texts: list[str]) -> float:
    return float(texts[-1].split()[0])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs for axes: one that diverged, one with an outlier, two of one learning rate, and none that trains."""
    root = tmp_path_factory.mktemp("odd")
    for name, lr, shift in (("a", 0.001, 0.0), ("b", 0.001, 1.0), ("c", 0.01, 3.0), ("far", 0.1, 0.0)):
        path = runs.folder(root, name, lr=lr)
        lines = [runs.metrics(step, loss=2 + shift + 1 / step) for step in range(1, 101)]
        if name == "far":
            lines[50]["loss"] = 370_000.0
        if name == "c":
            lines = [
                {key: v for key, v in line.items() if not key.startswith(("exchange", "experts"))} for line in lines
            ]
        runs.append(path / "metrics.rank0.jsonl", lines)
        runs.append(path / "events.jsonl", [runs.event("end", 60, step=100, status="finished", exit_code=0)])
    with serving(root) as server:
        yield server


# What was wrong.


def test_curves_by_layer_reach_the_last_step(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=experts&run=finished") as page:
        entropy = figure(page, "entropy")
        page.locator(".lazy").nth(3).scroll_into_view_if_needed()
        assert ticks(entropy, "x")[-1] == "200"
        rows = entropy.locator(".legend tbody tr")
        expect(rows).to_have_count(3)
        assert rows.nth(2).inner_text().split() == ["layer", "3", f"{2.7 - 0.2 - 0.03:.4f}", "2.4700", "2.6690"]


@pytest.mark.parametrize("view", ["experts", "timing", "gpus", "data", "checkpoints", "console"])
def test_views_of_one_run_begin_with_one_that_has_begun(browser: Browser, server: Server, view: str) -> None:
    assert server.json("/api/runs")["runs"][0]["name"] == "bare", "the newest, which has no step"
    with opened(browser, f"{server.url}/?view={view}&run=bare&run=finished") as page:
        if view == "data":
            expect(page.locator("#mixture")).to_be_visible()
        else:
            expect(page.get_by_label("run", exact=True)).to_have_value("finished")
            assert "bare (no step yet)" in page.get_by_label("run", exact=True).inner_text()


def test_on_a_phone_the_current_view_is_in_sight(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?run=finished", viewport={"width": 390, "height": 740}) as page:
        for view in VIEWS:
            goto(page, f"{server.url}/?view={view}&run=finished")
            expect(page.locator("nav a.here")).to_be_in_viewport(ratio=0.98)
        goto(page, f"{server.url}/?find=finished")
        expect(page.get_by_role("cell", name=f"{runs.loss(200):.4f}")).to_be_in_viewport(ratio=0.98)
        goto(page, f"{server.url}/?view=events&run=finished&event=alert")
        expect(page.locator("#events td.text")).to_be_in_viewport(ratio=0.9)


def test_numbers_have_the_unit_that_fits(browser: Browser, server: Server) -> None:
    asked = """async () => {
        const f = await import("/static/format.js"), a = await import("/static/axes.js");
        return [
            f.count(3.67e9), f.count(3_039_000), f.count(9999), f.count(10_490_000_000), f.number(4.19e6),
            f.hours(0.0002), f.hours(1.5), ...[70.51e9, 999, 1024, 31_753_112].map(f.bytes),
            a.ticks([65e9, 65.5e9, 66e9], true, f.bytes).join("|"),
            a.ticks([0, 1 / 60, 2 / 60], true, f.hours).join("|"),
            a.ticks([0, 2e9, 4e9], true, f.count).join("|"),
            a.ticks([0, 0.0002, 0.0004], true, f.number).join("|"),
            a.ticks([1, 10, null, 100], false, f.number).join("|"),
            a.around(0, 0, 0).join("|"),
        ];
    }"""
    with opened(browser, server.url) as page:
        assert page.evaluate(asked) == [
            *("3.67 B", "3.039 M", "9999", "10.49 B", "4.19 M"),
            *("1 s", "1 h 30 min"),
            *(quantity(value, "B") for value in (70.51e9, 999, 1024, 31_753_112)),
            "65.0 GB|65.5 GB|66.0 GB",
            "0|1 min|2 min",
            "0|2 B|4 B",
            "0|2e-4|4e-4",
            "1|10||100",
            "0|1",
        ]


def test_axes_of_the_machine_say_what_is_much(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=gpus&run=finished") as page:
        busy = ticks(figure(page, "Utilization"), "y")
        assert (busy[0], last_number(busy)) == ("0", 100)
        memory = ticks(figure(page, "Memory used"), "y")
        assert memory[0] == "0" and len(set(memory)) == len(memory) and all("GB" in text for text in memory[1:])
        assert last_number(memory) >= 80, "up to the memory there is"
        errors = ticks(figure(page, "ECC errors, not corrected"), "y")
        assert (errors[0], last_number(errors)) == ("0", 1)
        power = [float(text) for text in ticks(figure(page, "Power"), "y")]
        assert power[-1] - power[0] >= 40, "a constant with noise is not stretched over the chart"
        assert ticks(figure(page, "Power"), "x") == ["0", *(f"{seconds} s" for seconds in range(15, 95, 15))]
        expect(page.locator("#host")).to_have_text("host: CPU 31.5 % · memory 12.9 GB of 68.7 GB · disk 9.9 TB free")
        expect(figure(page, "Power").locator(".chart-unit")).to_have_text("W")


def test_one_outlier_does_not_flatten_a_chart(browser: Browser, odd: Server) -> None:
    with opened(browser, f"{odd.url}/?view=charts&run=a&run=far&tags=^loss") as page:
        loss = figure(page, "loss")
        assert last_number(ticks(loss, "y")) < 10
        loss.get_by_role("button", name="beyond the axis").click()
        page.wait_for_url(re.compile("ally=1"))
        expect(loss.locator(".plot")).to_have_attribute("data-y", re.compile("[34]00 k"))
        expect(page.get_by_label("outliers")).to_be_checked()


def test_what_the_axis_shows_is_not_beyond_it(browser: Browser, server: Server) -> None:
    """Two GPUs of 603 and 613 W: further apart than either moves, and both within an axis of a tenth of their size."""
    with opened(browser, f"{server.url}/?view=gpus&run=finished", viewport={"width": 1280, "height": 2000}) as page:
        assert last_number(ticks(figure(page, "Power"), "y")) >= 610
        expect(figure(page, "Power").locator(".beyond")).to_have_count(0)


def test_ordinary_curves_are_shown_whole(browser: Browser, server: Server) -> None:
    asked = """async ([start, spread]) => {
        const { ordinary } = await import("/static/axes.js");
        const decay = [...Array(400).keys()].map((step) => 2 + start / (1 + step / spread));
        const apart = [0.001, 5, 900].map((level) => ({ values: decay.map((value) => level * value) }));
        const spike = decay.map((value, step) => (step === 200 ? 1e9 : value));
        const far = ordinary([{ values: spike }, { values: decay.map(() => null) }]);
        const ramp = (steps) => ({ values: [...Array(steps).keys()].map((step) => 2000 + step) });
        const longer = [40, 70, 150, 200].map(ramp);
        return [ordinary([{ values: decay }]), ordinary([]), ordinary([{ values: [3, 3, 3] }]), ordinary(longer),
            ordinary(apart)?.high > 1800, far.outside, far.high];
    }"""
    with opened(browser, server.url) as page:
        whole, none, constant, longer, seen, outside, high = page.evaluate(asked, [9, 40])
        assert (whole, none, constant, longer, outside) == (None, None, None, None, 1)
        assert seen is not False and high == pytest.approx(11)


def test_events_are_told_in_words(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=events&run=finished") as page:
        expect(page.locator("#events tbody tr")).to_have_count(10)
        texts = [cell.inner_text() for cell in page.locator("#events td.text").all()]
        assert f"{runs.CHECKPOINT}: 31.8 MB in 0.174 s, training waited 0.0312 s" in texts
        assert f"{runs.loss(100) + 0.1:.4f} nats/token, 1.5000 bits/byte, over 57,984 tokens" in texts
        assert "a mixture of 3 sources in 2 stages" in texts and "finished, exit code 0" in texts
        assert "driver 570.86.15, CUDA 12.8" in texts
        assert not [text for text in texts if "{" in text or "[" in text]


def test_the_arrows_of_a_heat_map_point_along_its_axes(browser: Browser, server: Server) -> None:
    spy = """window.texts = [];
        const write = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {
            window.texts.push(String(text)); return write.call(this, text, ...at); };"""
    with opened(browser, "about:blank") as page:
        page.add_init_script(spy)
        goto(page, f"{server.url}/?view=experts&run=finished")
        arrows = {text for text in page.evaluate("window.texts") if "→" in text}
        assert arrows == {"layer ↓   expert →", "expert ↓   step →"}, "rows are counted downwards"


def test_it_says_live_only_of_runs_that_train(browser: Browser, odd: Server, tmp_path: Path) -> None:
    with opened(browser, odd.url) as page:
        expect(page.locator(".live")).to_have_text("nothing running")
        expect(page.locator(".live")).to_have_class("live idle")
    runs.resumed(tmp_path)
    with serving(tmp_path) as training, opened(browser, training.url) as page:
        expect(page.locator(".live")).to_have_text("1 running")
        expect(page.locator(".live")).to_have_class("live on")
        (row,) = training.json("/api/runs")["runs"]
        assert row["left_s"] == pytest.approx(50 * runs.TOKENS / (2048 + 150)), "50 steps at the speed it has"


def test_no_card_is_empty(browser: Browser, odd: Server) -> None:
    with opened(browser, f"{odd.url}/?view=timing&run=c", viewport={"width": 1280, "height": 4000}) as page:
        names = [each.get_attribute("aria-label") for each in page.locator("figure").all()]
        assert "step_s" in names and not [name for name in names if name and name.startswith("exchange")]
        expect(page.locator("main .none")).to_have_count(0)
        goto(page, f"{odd.url}/?view=charts&run=c&x=flops&tags=^loss")
        expect(page.locator("main .none")).to_have_text("loss no FLOPs a token in these runs")
        assert page.locator(".lazy").evaluate("node => node.clientHeight") < 60
        goto(page, f"{odd.url}/?view=gpus&run=c")
        expect(page.locator("main .empty")).to_contain_text("No GPU telemetry")


def test_only_what_differs_from_the_first_run_is_tinted(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=configs&run=finished&run=resumed&run=bare&all=1") as page:
        expect(page.locator("#configs td.differs")).to_have_text(["0.002"])
        expect(page.locator("#configs th.stay").first).to_have_css("position", "sticky")


def test_losses_are_sorted_best_first_and_what_is_none_last(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as page:
        page.get_by_role("button", name="loss", exact=True).click()
        expect(page.locator("thead th[aria-sort=ascending]")).to_have_text("loss ↑")
        names = [cell.inner_text().strip() for cell in page.locator("tbody td.name").all()]
        assert names == ["finished", "resumed", "crashed", "lost", "nan-loss", "bare"]
        page.get_by_role("button", name="loss ↑").click()
        expect(page.locator("tbody td.name").last).to_have_text("bare")
        expect(page.locator("tbody td.name").first).to_contain_text("lost")


def test_folders_of_data_are_counted_in_words(browser: Browser, data: Path, tmp_path: Path) -> None:
    runs.finished(tmp_path, steps=2)
    (tmp_path / "finished" / "events.jsonl").write_text("")
    with (tmp_path / "finished" / "config.toml").open("a") as file:
        file.write("[data]\nprefetch = 2\n")
    with serving(tmp_path, "--data", str(data)) as server, opened(browser, f"{server.url}/?view=data&folder=1") as page:
        row = page.locator("#splits tr.group").first
        expect(row).to_have_text(re.compile(r"1 shard, \d+(\.\d+)? B$"))
        tokens = server.json("/api/document?folder=1&split=train&number=0")["tokens"]
        expect(page.locator(".sample h3")).to_contain_text(f"{len(tokens) - 1} tokens and the end of text")
        expect(page.locator("#data-config")).to_have_text("prefetch2")


# What was missing.


def test_a_legend_has_last_and_best_and_lights_its_line_in_every_chart(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=charts&run=finished&run=resumed&tags=^loss$ grad_norm") as page:
        loss, norm = figure(page, "loss"), figure(page, "grad_norm")
        row = loss.locator(".legend tbody tr", has_text="finished")
        expect(row).to_have_text(re.compile(r"finished\s*2\.7826\s*2\.7826"))
        assert loss.locator(".legend thead").inner_text().split() == ["last", "best"]
        assert norm.locator(".legend thead").inner_text().split() == ["last", "min", "max"]
        row.hover()
        for chart in (loss, norm):
            expect(chart.locator(".plot")).to_have_attribute("data-lit", "finished")
            expect(chart.locator(".legend tr.lit")).to_contain_text("finished")
        page.locator("aside li", has_text="resumed").hover()
        expect(norm.locator(".plot")).to_have_attribute("data-lit", "resumed")
        page.mouse.move(5, 5)
        expect(norm.locator(".plot")).to_have_attribute("data-lit", "")


def test_charts_show_lines_of_alerts_unless_all_are_asked_for(browser: Browser, server: Server) -> None:
    with opened(browser, "about:blank") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "/api/events" in request.url else None)
        goto(page, f"{server.url}/?view=charts&run=finished&run=nan-loss&tags=^loss")
        assert asked and all("alerts=1" in url for url in asked)
        kinds = {event["event"] for event in server.json(asked[0].removeprefix(server.url))["events"]}
        assert kinds == {"alert", "nonfinite", "end"}, "of the ends only the failure"
        asked.clear()
        page.get_by_label("events in charts").select_option("all")
        page.wait_for_url(re.compile("events=all"))
        drawn(page)
        assert asked and not any("alerts=1" in url for url in asked)
        asked.clear()
        page.get_by_label("events in charts").select_option("none")
        drawn(page)
        assert asked == []


def test_metrics_are_in_sections_and_found_by_expressions(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=charts&run=finished") as page:
        names = [each.inner_text().split()[0] for each in page.locator("details.section summary").all()]
        assert names == ["training", "lr", "time", "validation", "exchange"]
        find = page.get_by_label("find metrics")
        find.fill("^time/(data|opt)")
        expect(page.locator(".lazy")).to_have_count(2)
        find.fill("^loss$ mfu")
        expect(page.locator(".lazy")).to_have_count(2)
        find.fill("loss(")
        expect(page.locator("main .empty")).to_have_text("No metric of these runs is called like this.")
        find.fill("")
        page.locator("summary", has_text="time").click()
        page.wait_for_url(re.compile("closed=time"))
        expect(page.locator("details.section", has_text="time").locator(".lazy")).to_have_count(0)


def test_a_chart_fills_the_screen_and_shrinks_again(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=charts&run=finished&tags=^loss") as page:
        small = figure(page, "loss").locator("canvas").bounding_box()
        page.get_by_role("button", name="enlarge loss").click()
        page.wait_for_function("document.querySelector('.full canvas')?.clientHeight > 500")
        large = figure(page, "loss").bounding_box()
        assert small is not None and large is not None and large["width"] > 1200 and large["height"] > 650
        assert "full=loss" in page.url
        page.keyboard.press("Escape")
        page.wait_for_function("document.querySelector('figure canvas').clientHeight < 300")


def test_the_wall_clock_is_an_axis(browser: Browser, server: Server) -> None:
    series = server.json("/api/series?run=finished&tag=loss&x=clock")
    assert series["x"] == [(runs.BEGAN.timestamp() + step / 2) for step in range(1, 201)]
    events = {each["event"]: each for each in server.json("/api/events?run=finished&x=clock")["events"]}
    assert events["alert"]["x"] == runs.BEGAN.timestamp() + 60
    address = f"{server.url}/?view=charts&run=finished&tags=^loss"
    with opened(browser, address, timezone_id="UTC") as page:
        page.get_by_label("x axis").select_option("wall clock")
        page.wait_for_url(re.compile("x=clock"))
        expect(figure(page, "loss").locator(".plot")).to_have_attribute("data-drawn", re.compile("."))
        expect(figure(page, "loss").locator(".plot")).to_have_attribute(
            "data-x", "06:00:15\n2026-11-24 | 06:00:30 | 06:00:45 | 06:01 | 06:01:15 | 06:01:30"
        )
        over = figure(page, "loss").locator(".u-over")
        over.hover()
        expect(figure(page, "loss").locator(".tip-x").first).to_contain_text("wall clock 2026-11-24")


def test_there_is_one_list_of_runs(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as page:
        expect(page.locator("table.runs")).to_be_visible()
        expect(page.locator("aside")).to_have_count(0)
        page.get_by_role("link", name="Charts").click()
        expect(page.locator("aside li")).to_have_count(6)


def test_the_table_has_the_best_value(server: Server) -> None:
    rows = {run["name"]: run for run in server.json("/api/runs")["runs"]}
    best = min(runs.loss(step) + 0.1 for step in (50, 100, 150, 200))
    assert rows["finished"]["best_validation_loss"] == best and rows["bare"]["best_validation_loss"] is None
    assert rows["finished"]["left_s"] is None


def test_checkpoints_have_the_command_that_resumes(browser: Browser, server: Server) -> None:
    root = server.json("/api/runs")["root"]
    with opened(browser, f"{server.url}/?view=checkpoints&run=finished") as page:
        row = page.locator("#checkpoints tbody tr")
        expect(row).to_have_count(1)
        cells = [cell.inner_text().strip() for cell in row.locator("td").all()]
        assert cells[:4] == ["100", f"{runs.loss(100) + 0.1:.4f}", "31.8 MB", "0.17 s"]
        folder = f"{root}/finished"
        command = f"nmoe run {folder}/config.toml --train.resume={folder}/checkpoints/{runs.CHECKPOINT}"
        assert row.locator("code").inner_text() == command
        expect(page.locator("main")).to_contain_text("1 here, 1 deleted since")


def test_the_console_is_what_was_printed(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=console&run=finished") as page:
        expect(page.locator("#console")).to_have_text(
            "config         quickstart\nstep 2/200\nfinished       200 steps", use_inner_text=True
        )
        page.get_by_label("find lines").fill("step 2/")
        expect(page.locator("#console")).to_have_text("step 2/200", use_inner_text=True)
        goto(page, f"{server.url}/?view=console&run=crashed")
        expect(page.locator("main .empty")).to_have_text("This run folder has no console.log.")


def test_scores_of_benchmarks_are_evaluations(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=evaluations&run=finished&run=crashed") as page:
        row = page.locator("#scores tbody tr")
        expect(row).to_have_count(1)
        assert row.inner_text().split("\t")[1:] == ["arc_easy", "0.4125", "0.0101", "2,376", "-", "2026-11-24 07:00"]


def test_evaluations_over_steps_have_their_standard_errors(browser: Browser, tmp_path: Path) -> None:
    """Two runs that were evaluated thrice, as training logs it; the last error is of one item, and infinite."""
    for name, shift in (("a", 0.0), ("b", 0.1)):
        path = runs.folder(tmp_path, name)
        runs.append(path / "metrics.rank0.jsonl", (runs.metrics(step) for step in range(1, 151)))
        for step, error in ((50, 0.04), (100, 0.02), (150, 0.01 if name == "a" else "inf")):
            score = round(0.25 + shift + step / 1000, 3)
            line = {"attempt": 1, "time": runs.at(step / 2), "step": step, "elapsed_s": step / 2}
            line |= {"evaluation/bodies": score, "evaluation_error/bodies": error}
            runs.append(path / "metrics.rank0.jsonl", [line])
            scores = {"bodies": {"value": score, "error": error, "count": 40}, "odd": 1}
            runs.append(path / "events.jsonl", [runs.event("evaluation", step / 2, step=step, scores=scores)])
        runs.append(path / "events.jsonl", [runs.event("evaluation", 99, step=160, scores="none")])
    with serving(tmp_path) as server:
        with opened(browser, f"{server.url}/?view=evaluations&run=a") as page:
            chart = figure(page, "evaluation/bodies")
            expect(chart.locator(".chart-note")).to_have_text("0.4000 ± 0.0100")
            expect(page.locator("#scored thead th")).to_have_text(["run", "step", "bodies", "time"])
            cells = [row.inner_text().split("\t")[1:3] for row in page.locator("#scored tbody tr").all()]
            assert cells == [
                ["160", "–"],
                ["150", "0.4000 ± 0.0100"],
                ["100", "0.3500 ± 0.0200"],
                ["50", "0.3000 ± 0.0400"],
            ]
            goto(page, f"{server.url}/?view=evaluations&run=a&run=b")
            expect(page.locator("#scored tbody tr")).to_have_count(8)
            expect(chart.locator(".legend tbody tr")).to_have_text([re.compile("a.*0.4000"), re.compile("b.*0.5000")])
            assert "0.5000 ±" not in page.locator("#scored").inner_text(), "an infinite error is none"
            goto(page, f"{server.url}/?view=charts&run=a")
            expect(page.locator("summary", has_text="evaluation")).to_have_text("evaluation 1")
            made = page.evaluate(
                """async () => {
                    const { aroundScore } = await import("/static/charts.js");
                    const curve = { run: "a", mean: [0.3, null, 0.4] }, curves = [{ run: "a", mean: [0.04, null] }];
                    return aroundScore(curve, [50, 60, 150], { x: [50, 150], curves });
                }"""
            )
            assert made == {
                "low": [pytest.approx(0.26), None, None],
                "high": [pytest.approx(0.34), None, None],
                "error": 0.04,
            }


def test_the_panel_of_alerts_leads_to_the_run(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as page:
        page.get_by_role("button", name="alerts", exact=True).first.click()
        panel = page.get_by_role("dialog", name="alerts")
        expect(panel).to_contain_text("layer 2: 1 expert is dead")
        expect(panel).to_contain_text("loss is finite")
        panel.locator(".alert-row", has_text="1 expert is dead").click()
        page.wait_for_url(re.compile("run=finished.*view=charts|view=charts.*run=finished"))


def test_groups_are_a_mean_and_a_band(browser: Browser, odd: Server) -> None:
    with opened(browser, f"{odd.url}/?view=charts&run=a&run=b&run=c&tags=^loss&group=optim.peak_lr") as page:
        rows = figure(page, "loss").locator(".legend tbody tr")
        expect(rows).to_have_count(2)
        assert rows.nth(0).inner_text().split("\t") == ["optim.peak_lr = 0.001 (2)", "2.5100", "2.5100"]
        assert rows.nth(1).inner_text().split("\t") == ["optim.peak_lr = 0.01 (1)", "5.0100", "5.0100"]
        made = page.evaluate(
            """async () => {
                const { grouped } = await import("/static/groups.js");
                const curves = [{ run: "a", mean: [1, null, 3] }, { run: "b", mean: [3, 4, null] }];
                return grouped(curves, () => "all", false);
            }"""
        )
        assert (made[0]["values"], made[0]["low"], made[0]["high"]) == ([2, 3, 3], [1, 2, 3], [3, 4, 3])


def test_every_address_for_programs_answers(server: Server) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "viz.md").read_text()
    contract: dict[str, Any] = server.json("/api/contract")
    rows = re.findall(r"^\| `(/api/[^`]+)` \| (\w+) \|", text, re.M)
    assert len(rows) >= 12
    for path, kind in rows:
        answer = server.json(path.replace("NAME", "finished"))
        assert set(answer) == set(contract[kind]), path
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    said: list[str] = []
    exec(code[1].replace("http://localhost:6543", server.url).replace("first", "finished"), {"print": said.append})
    assert json.loads(json.dumps(said)) == [runs.loss(200)]


def test_a_run_of_one_validation_hides_no_others(browser: Browser, tmp_path: Path) -> None:
    """One value has no spread: as the measure of what lies far away it cut the other run's curve off in its middle."""
    for name, losses in (("long", (4.3, 3.5, 2.9)), ("short", (4.6,))):
        path = runs.folder(tmp_path, name)
        lines = [
            {"attempt": 1, "time": runs.at(place), "step": 50 * place, "elapsed_s": place, "validation/loss": loss}
            for place, loss in enumerate(losses, start=1)
        ]
        runs.append(path / "metrics.rank0.jsonl", [*(runs.metrics(step) for step in range(1, 150)), *lines])
    with (
        serving(tmp_path) as server,
        opened(browser, f"{server.url}/?view=evaluations&run=long&run=short") as page,
    ):
        chart = figure(page, "validation/loss")
        expect(chart.locator(".legend tbody tr")).to_have_count(2)
        expect(chart.locator(".beyond")).to_have_count(0)
        assert float(ticks(chart, "y")[0]) <= 3.0


def test_keys_of_a_config_are_whole_on_a_phone(browser: Browser, server: Server) -> None:
    """qk_nope_head_dim and qk_rope_head_dim both read model.attention.qk..."""
    with opened(
        browser, f"{server.url}/?view=configs&run=finished&run=resumed", viewport={"width": 390, "height": 844}
    ) as page:
        page.get_by_label("differences only").uncheck()
        keys = page.locator(".configs tbody th.stay")
        expect(keys.first).to_be_visible()
        cut = keys.evaluate_all("(all) => all.filter((key) => key.scrollWidth > key.clientWidth).length")
        assert cut == 0 and page.locator(".configs td").first.is_visible()
        assert keys.locator("span").evaluate_all(LINES) == [1], "a key breaks behind a dot or an underscore alone"


def test_values_of_a_config_are_whole(browser: Browser, tmp_path: Path) -> None:
    """On a phone nothing is under a mouse that would show what an ellipsis hides."""
    command = "nmoe run quickstart --train.steps=300 --run.name={} --log.every=10 --checkpoint.every=50"
    for name in ("a", "b"):
        (runs.folder(tmp_path, name) / "provenance.toml").write_text(f'command = "{command.format(name)}"\n')
    with (
        serving(tmp_path) as server,
        opened(browser, f"{server.url}/?view=configs&run=a&run=b", viewport={"width": 390, "height": 844}) as page,
    ):
        values = page.locator(".configs tbody td")
        expect(values.get_by_text(command.format("b"))).to_be_visible()
        assert values.evaluate_all("(all) => all.filter((value) => value.scrollWidth > value.clientWidth).length") == 0


@pytest.mark.parametrize("width", [390, 1000, 1440])
def test_a_command_is_not_broken_behind_its_dashes(browser: Browser, server: Server, width: int) -> None:
    """They would read as an option of nothing."""
    address = f"{server.url}/?view=checkpoints&run=finished&one=finished"
    with opened(browser, address, viewport={"width": width, "height": 844}) as page:
        command = page.locator(".command code").first
        expect(command).to_be_visible()
        assert re.search(" --train.resume=", command.text_content() or "")
        assert command.evaluate(TOPS_OF, "--train.resume=") == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_of_layers_stand_out_from_the_page(browser: Browser, server: Server, theme: str) -> None:
    """Contrast by WCAG 2.2: 3 to 1 at least for what a picture says (success criterion 1.4.11)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    with opened(browser, f"{server.url}/?view=experts&one=finished&theme={theme}") as page:
        page.locator("figure").last.scroll_into_view_if_needed()
        drawn(page)
        lines = page.locator("figure .legend .swatch")
        expect(lines.first).to_be_visible()
        colours = lines.evaluate_all("(all) => all.map((node) => getComputedStyle(node).backgroundColor)")
        card = page.locator("figure").last.evaluate("(node) => getComputedStyle(node).backgroundColor")
    assert len(set(colours)) > 1
    for colour in set(colours):
        low, high = sorted((luminance(colour), luminance(card)))
        assert (high + 0.05) / (low + 0.05) >= 3, (colour, card)


def test_a_table_that_goes_on_to_the_right_shows_it(browser: Browser, server: Server) -> None:
    with opened(browser, f"{server.url}/?view=gpus&run=finished", viewport={"width": 390, "height": 844}) as page:
        table = page.locator(".scroll").first
        expect(table).to_have_css("background-image", re.compile("gradient.*gradient"))
        assert table.evaluate("(node) => node.scrollWidth > node.clientWidth")


def test_parallel_axes_beyond_the_screen_are_shown_to_be_there(browser: Browser, tmp_path: Path) -> None:
    """On a narrow phone the axis of the result lies to the right of what is in sight."""
    for name, steps, lr in (("a", 30, 0.001), ("b", 60, 0.002)):
        path = runs.folder(tmp_path, name, steps=steps, lr=lr)
        runs.append(path / "metrics.rank0.jsonl", [runs.metrics(step) for step in range(1, steps + 1)])
    with (
        serving(tmp_path) as server,
        opened(browser, f"{server.url}/?view=compare&run=a&run=b", viewport={"width": 320, "height": 844}) as page,
    ):
        axes = page.locator(".parallel-scroll")
        expect(axes).to_be_visible()
        assert axes.evaluate("(node) => node.scrollWidth > node.clientWidth")
        expect(axes).to_have_css("background-image", re.compile("gradient.*gradient"), timeout=5_000)
