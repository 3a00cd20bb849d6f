"""Runs against each other, on values: results against keys of configs, parallel coordinates, experts of two runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.effects.runs import viz_runs as runs
from tests.effects.runs.viz_page import drawn, goto, opened
from tests.effects.runs.viz_server import Server, serving

SWEEP = {
    "a": (0.001, "adamw", 3.0),
    "b": (0.01, "muon", 2.0),
    "c": (0.1, "adamw", 4.0),
    "d": (0.01, "adamw", 2.5),
    "e": (0.01, "muon", None),
}
"""Learning rate, optimizer and loss of each run."""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("sweep")
    for name, (lr, optimizer, loss) in SWEEP.items():
        folder = runs.folder(root, name, lr=lr)
        with open(folder / "config.toml", "a") as file:
            file.write(f'optimizer = "{optimizer}"\n')
        if loss is not None:
            runs.append(folder / "metrics.rank0.jsonl", [runs.metrics(1, loss=loss)])
    with serving(root) as server:
        yield server


def test_a_result_is_compared_against_a_key_of_the_config(browser: Browser, sweep: Server) -> None:
    with opened(browser, f"{sweep.url}/?view=compare&run=*&cx=optim.peak_lr&cy=loss&logx=1") as page:
        points = page.locator("svg.scatter circle")
        expect(points).to_have_count(4)
        places = {
            each.get_attribute("data-run"): (float(each.get_attribute("cx") or 0), float(each.get_attribute("cy") or 0))
            for each in points.all()
        }
        assert places["b"][0] == places["d"][0] == pytest.approx((places["a"][0] + places["c"][0]) / 2)
        assert places["c"][1] < places["a"][1] < places["b"][1], "the greater loss is higher up"
        assert places["a"][1] == pytest.approx((places["b"][1] + places["c"][1]) / 2), "2, 3 and 4"
        page.locator("circle[data-run=c]").hover()
        expect(page.locator(".chart-note").first).to_have_text("c: 0.1000, 4")


def corners(page: Page) -> dict[str, list[tuple[float, float]]]:
    """Run -> where its line crosses each axis."""
    lines = page.locator("svg.parallel polyline")
    expect(lines).to_have_count(4)
    return {
        line.get_attribute("data-run") or "": [
            (float(x), float(y)) for x, y in (pair.split(",") for pair in (line.get_attribute("points") or "").split())
        ]
        for line in lines.all()
    }


def test_parallel_coordinates_are_keys_that_differ_and_the_result(browser: Browser, sweep: Server) -> None:
    with opened(browser, f"{sweep.url}/?view=compare&run=*&cy=loss") as page:
        lines = corners(page)
        names = [name.text_content() or "" for name in page.locator("svg.parallel text.name").all()]
        assert names == ["optim.peak_lr (log)optim.peak_lr", "train.optimizertrain.optimizer", "lossloss"]
        lr, optimizer, loss = ({run: points[axis][1] for run, points in lines.items()} for axis in range(3))
        assert lr["b"] == lr["d"] == pytest.approx((lr["a"] + lr["c"]) / 2, abs=0.1), "0.01 is halfway by its logarithm"
        assert optimizer["a"] == optimizer["c"] == optimizer["d"] != optimizer["b"]
        assert loss["a"] == pytest.approx((loss["b"] + loss["c"]) / 2, abs=0.1) and loss["c"] < loss["b"]
        page.get_by_label("leave out the axis optim.peak_lr").click()
        expect(page.locator("svg.parallel text.name")).to_have_count(2)
        page.get_by_label("add an axis").select_option("optim.peak_lr")
        expect(page.locator("svg.parallel text.name")).to_have_count(3)


def test_a_stretch_of_an_axis_keeps_the_runs_that_pass_there(browser: Browser, sweep: Server) -> None:
    with opened(browser, f"{sweep.url}/?view=compare&run=*&cy=loss") as page:
        loss = {run: points[2] for run, points in corners(page).items()}

        def draw(top: float, bottom: float, x: float) -> None:
            page.locator("svg.parallel").scroll_into_view_if_needed()
            box = page.locator("svg.parallel").bounding_box()
            assert box is not None
            page.mouse.move(box["x"] + x, box["y"] + top)
            page.mouse.down()
            page.mouse.move(box["x"] + x, box["y"] + bottom, steps=4)
            page.mouse.up()

        draw(loss["d"][1] - 5, loss["b"][1] + 5, loss["b"][0])
        expect(page.locator("#kept")).to_have_text("2 of 4 runs")
        kept = {line.get_attribute("data-run") for line in page.locator("polyline[data-kept='1']").all()}
        assert kept == {"b", "d"}, "losses of 2.0 and 2.5"
        page.wait_for_url(re.compile("brush="))
        page.reload()
        drawn(page)
        expect(page.locator("#kept")).to_have_text("2 of 4 runs")
        optimizer = corners(page)["b"][1]
        draw(optimizer[1] - 8, optimizer[1] + 8, optimizer[0])
        expect(page.locator("#kept")).to_have_text("1 of 4 runs")
        page.get_by_role("button", name="choose these 1").click()
        page.wait_for_url(re.compile("run=b"))
        page.go_back()
        goto(page, f"{sweep.url}/?view=compare&run=*&cy=loss&brush=2.4 2.6 result")
        expect(page.locator("#kept")).to_have_text("1 of 4 runs")
        page.get_by_role("button", name="all runs").click()
        expect(page.locator("polyline[data-kept='0']")).to_have_count(0)


def test_experts_of_two_runs_stand_side_by_side_on_the_same_axes(browser: Browser, tmp_path: Path) -> None:
    for name, steps in (("short", 100), ("long", 200)):
        runs.finished(tmp_path, name, steps=steps)
    with serving(tmp_path) as server:
        where = f"{server.url}/?view=experts&run=short&run=long&one=short"
        server.json("/api/runs")
        with opened(browser, where, viewport={"width": 1280, "height": 4000}) as page:
            page.get_by_label("beside").select_option("long")
            expect(page.locator("#experts-about")).to_have_text(
                "3 MoE layers, 16 experts, top 2 · 3 MoE layers, 16 experts, top 2"
            )
            titles = page.locator(".pair figure.wide .chart-title")
            expect(titles).to_have_count(4)
            assert [title.inner_text() for title in titles.all()][::2] == [
                "Load of each expert at step 100",
                "Load of each expert at step 200",
            ], "each at its newest step"
            goto(page, f"{where}&two=long&step=50&layer=2")
            expect(titles).to_have_count(4)
            expect(titles.nth(0)).to_have_text("Load of each expert at step 50")
            expect(titles.nth(2)).to_have_text("Load of each expert at step 50")
            expect(titles.nth(3)).to_have_text("Load of each expert of layer 2 over time")
            dead = [
                cell.inner_text()
                for cell in page.locator("#experts-latest tbody tr:nth-child(2) td:nth-child(4)").all()
            ]
            assert dead == ["0", "1"], "expert 5 of layer 2 is dead after step 100"
            # Entropies of 2.60 and of 2.50 at the end, on one axis, whichever answer comes first.
            for name in ("short", "long"):
                plot = page.get_by_role("figure", name=f"entropy, {name}").locator(".plot")
                expect(plot).to_have_attribute("data-y", "2.50 | 2.55 | 2.60 | 2.65")
            page.get_by_label("beside").select_option("")
            expect(page.locator(".pair")).to_have_count(0)
