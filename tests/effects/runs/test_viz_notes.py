"""Notes, tags and hidden runs: what the page writes, where, for whom, and what it never touches."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from nmoe.effects.record.names import NOTES
from nmoe.effects.runs import notes
from nmoe.errors import InputError
from tests.effects.runs import viz_runs as runs
from tests.effects.runs.viz_page import drawn, goto, opened
from tests.effects.runs.viz_server import Server, serving

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noted")
    for name in ("first", "second", "third"):
        runs.append(runs.folder(root, name) / "metrics.rank0.jsonl", [runs.metrics(step) for step in range(1, 4)])
    return root


@pytest.fixture(scope="module")
def noted(root: Path) -> Iterator[Server]:
    with serving(root) as server:
        server.json("/api/runs")
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run but for its notes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != NOTES}


def said(server: Server, name: str) -> dict[str, Any]:
    """What the table says of a run's notes."""
    return {run["name"]: run["notes"] for run in server.json("/api/runs")["runs"]}[name]


def test_notes_are_written_in_the_page_and_found(browser: Browser, noted: Server, root: Path) -> None:
    before = contents(root / "first")
    with opened(browser, f"{noted.url}/?sort=name&dir=up") as page:
        page.get_by_label("edit notes of first").click()
        page.get_by_label("tags, with commas between").fill("baseline,  wide , baseline")
        page.get_by_label("note", exact=True).fill("diverged <b>twice</b>\nsecond line")
        page.get_by_role("button", name="save").click()
        row = page.locator("table.runs tbody tr").first
        expect(row.locator(".chip")).to_have_text(["baseline", "wide"])
        expect(row.locator(".note-line")).to_have_text("diverged <b>twice</b>")
        written = {"note": "diverged <b>twice</b>\nsecond line", "tags": ["baseline", "wide"], "hidden": False}
        assert json.loads((root / "first" / NOTES).read_text()) == written
        page.get_by_label("find runs").fill("TWICE")
        expect(page.locator("table.runs tbody tr")).to_have_count(1)
        page.get_by_label("find runs").fill("")
        expect(page.locator("table.runs tbody tr")).to_have_count(3)
        row.get_by_role("button", name="wide").click()
        expect(page.locator("table.runs tbody tr")).to_have_count(1)
        page.reload()
        drawn(page)
        page.get_by_label("edit notes of first").click()
        expect(page.get_by_label("note", exact=True)).to_have_value("diverged <b>twice</b>\nsecond line")
        expect(page.get_by_label("tags, with commas between")).to_have_value("baseline, wide")
        page.get_by_label("note", exact=True).fill("thrown away")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog", name="notes")).to_have_count(0)
        assert "thrown" not in (root / "first" / NOTES).read_text()
    assert contents(root / "first") == before, "nothing else of the run is touched"


def test_a_hidden_run_is_in_no_list_until_hidden_ones_are_asked_for(
    browser: Browser, noted: Server, root: Path
) -> None:
    with opened(browser, noted.url) as page:
        page.get_by_label("hide second").focus()
        page.get_by_label("hide second").press("Enter")
        expect(page.locator("table.runs tbody tr")).to_have_count(2)
        assert json.loads((root / "second" / NOTES).read_text())["hidden"] is True
        goto(page, f"{noted.url}/?view=charts")
        expect(page.locator("aside li")).to_have_count(2)
        page.get_by_role("button", name="1 hidden").click()
        expect(page.locator("aside li")).to_have_count(3)
        page.get_by_role("link", name="Runs").click()
        page.get_by_label("unhide second").click()
        expect(page.get_by_role("button", name="1 hidden")).to_have_count(0)
        assert said(noted, "second")["hidden"] is False


def test_a_change_leaves_what_it_does_not_name(noted: Server, root: Path) -> None:
    for change in ({"note": "kept"}, {"tags": ["x"]}, {"hidden": True}, {"hidden": False}):
        code, text = noted.post("/api/notes", json.dumps({"run": "third"} | change).encode(), JSON)
        assert code == 200, text
    assert said(noted, "third") == {
        "note": "kept", "tags": ["x"], "hidden": False, "is_editable": True, "problem": None,
    }  # fmt: skip
    assert [path.name for path in (root / "third").glob(".*")] == [], "no temporary file stays"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"run": "none", "note": ""}, "expected the name of a run here, got 'none'"),
        ({"run": "../first", "note": ""}, "expected the name of a run here"),
        ({"run": "", "note": ""}, "expected the name of a run here"),
        ({"run": ".", "note": ""}, "expected the name of a run here"),
        ({"note": ""}, "run: expected the name of a run, got none"),
        ({"run": "first", "text": ""}, "expected the fields note, tags and hidden, got 'text'"),
        ({"run": "first", "note": "x" * 10_001}, "expected a note of at most 10000 characters"),
        ({"run": "first", "note": "\ud800"}, "expected a note of at most"),
        ({"run": "first", "note": 1}, "expected a note of at most"),
        ({"run": "first", "tags": "x"}, "expected a list of tags"),
        ({"run": "first", "tags": ["\udfff"]}, "expected a list of tags"),
        ({"run": "first", "tags": [f"{n}" for n in range(33)]}, "expected at most 32 tags of 60 characters"),
        ({"run": "first", "tags": ["x" * 61]}, "expected at most 32 tags of 60 characters"),
        ({"run": "first", "hidden": 1}, "expected hidden to be true or false"),
        ([], "body: expected a JSON object"),
        ({"run": "first", "note": "x" * 70_000}, "body: expected at most 65536 bytes"),
    ],
)
def test_bad_notes_are_refused_and_nothing_is_written(noted: Server, root: Path, body: Any, problem: str) -> None:
    before = said(noted, "first")
    code, text = noted.post("/api/notes", json.dumps(body).encode(), JSON)
    assert code == 400 and problem in json.loads(text)["problems"][0]
    assert said(noted, "first") == before


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {**JSON, "Origin": "http://evil.example"},
        {**JSON, "Origin": "null"},
        {**JSON, "Origin": "http://127.0.0.1:1"},
        {**JSON, "Sec-Fetch-Site": "cross-site"},
        {**JSON, "Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_changes_nothing(noted: Server, headers: dict[str, str]) -> None:
    before = said(noted, "first")
    code, text = noted.post("/api/notes", b'{"run": "first", "note": "forged"}', headers)
    assert code == 403 and "expected" in text
    assert said(noted, "first") == before
    assert noted.get("/api/notes", "OPTIONS", **headers)[0] == 405, "no leave for another site to ask"


def test_a_token_is_asked_for_notes_too(root: Path) -> None:
    with serving(root, "--token", "a" * 16) as server:
        body = b'{"run": "first", "note": "forged"}'
        assert server.post("/api/notes", body, JSON)[0] == 401
        assert server.post("/api/notes", body, {**JSON, "Cookie": "nmoe_viz=" + "b" * 16})[0] == 401
        cookie = {"Cookie": "nmoe_viz=" + "a" * 16}
        server.get("/api/runs", **cookie)
        assert server.post("/api/notes", b'{"run": "first"}', {**JSON, **cookie})[0] == 200


def test_damaged_notes_are_named_and_not_replaced(tmp_path: Path) -> None:
    texts = dict(enumerate(("", "{", "[]", '{"note": 1}', '{"other": 1}', '{"note": NaN}')))
    for number, text in texts.items():
        path = runs.folder(tmp_path, f"damaged-{number}") / NOTES
        path.write_text(text)
        with pytest.raises(InputError, match="expected"):
            notes.read(path.parent)
    with serving(tmp_path) as server:
        for run in server.json("/api/runs")["runs"]:
            assert str(tmp_path / run["name"] / NOTES) in run["notes"]["problem"]
            assert run["notes"]["is_editable"] is False and run["notes"]["note"] == ""
            body = json.dumps({"run": run["name"], "note": "new"}).encode()
            assert server.post("/api/notes", body, JSON)[0] == 400
    assert {number: (tmp_path / f"damaged-{number}" / NOTES).read_text() for number in texts} == texts


def test_a_link_in_place_of_the_notes_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("keep")
    folder = runs.folder(tmp_path / "runs", "linked")
    (folder / NOTES).symlink_to(outside)
    notes.write(folder, notes.Notes(note="new"))
    assert outside.read_text() == "keep" and notes.read(folder).note == "new"


def test_a_folder_one_may_not_write_is_shown_and_not_edited() -> None:
    """As the user nobody where the tests run as root, whom no mode stops."""
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        folder = runs.folder(Path(base), "fixed")
        notes.write(folder, notes.Notes(note="by its owner", tags=("old",)))
        os.chmod(folder, 0o555)
        mine = os.geteuid()
        try:
            if mine == 0:
                os.seteuid(65534)
            assert not notes.is_editable(folder) and notes.read(folder).tags == ("old",)
            with pytest.raises(InputError, match="expected a run folder one may write, got Permission denied"):
                notes.write(folder, notes.Notes(note="by another"))
        finally:
            if mine == 0:
                os.seteuid(mine)
        os.chmod(folder, 0o755)
        assert notes.read(folder).note == "by its owner"
        shutil.rmtree(folder)


def test_where_nothing_may_be_written_the_page_says_so(browser: Browser, noted: Server) -> None:
    with opened(browser, noted.url) as page:

        def fixed(route: Any) -> None:
            answer = route.fetch()
            table = answer.json()
            for run in table["runs"]:
                run["notes"]["is_editable"] = False
            route.fulfill(response=answer, body=json.dumps(table))

        page.route("**/api/runs?*", fixed)
        goto(page, noted.url)
        expect(page.get_by_label("edit notes of first")).to_be_disabled()
        expect(page.get_by_label("hide first")).to_be_disabled()
