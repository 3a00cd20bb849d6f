"""`max_tokens` of a source, and data sets that are streamed: what is read, what is kept, what a crash costs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nmoe.cli import main
from nmoe.config.data_source import load_source
from nmoe.effects.data import tokenizer as tokenizers
from nmoe.effects.data.prepare import build, stream
from nmoe.effects.data.prepare.execute import open_pool
from nmoe.effects.data.prepare.prep import Report, prepare
from nmoe.effects.data.store.format import read_manifest
from nmoe.effects.data.store.shards import documents
from nmoe.errors import InputError

BYTES = tokenizers.make("bytes", tokenizers.PATTERN, [bytes([byte]) for byte in range(256)], end_of_text=256, size=257)
FILES = "[input]\nkind = 'jsonl'\npaths = ['in']\n"
STREAM = "[input]\nkind = 'stream'\ndataset = 'in'\n"


def text(number: int) -> str:
    draw = random.Random(number)
    return f"{number} " + "".join(draw.choices("abcdefgh ", k=draw.randint(40, 120)))


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two files of 300 texts, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "in").mkdir()
    for name, numbers in (("a", range(200)), ("b", range(200, 300))):
        lines = (json.dumps({"id": f"d{number}", "text": text(number), "other": 1}) + "\n" for number in numbers)
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "known").mkdir()
    tokenizers.save(BYTES, tmp_path / "known")
    return tmp_path


def source_file(home: Path, body: str) -> Path:
    path = home / "source.toml"
    path.write_text(f'tokenizer = "known/tokenizer.json"\ntask_bytes = 2000\n{body}')
    return path


def prepared(home: Path, body: str, out: str, workers: int = 1, share: tuple[int, int] = (0, 1)) -> Report:
    with open_pool(workers=workers, dask=None) as pool:
        report = prepare(load_source(source_file(home, body)), BYTES, home, home / out, pool, quiet, share)
    assert report is not None
    return report


def held(folder: Path, split: str) -> list[str]:
    run = tokenizers.encoding(BYTES)
    return [run.decode(each.tolist()) for each in documents(folder, read_manifest(folder), BYTES, split)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [500, 7_000, 12_345])
def test_the_first_documents_are_kept_whole_up_to_the_limit(home: Path, limit: int) -> None:
    prepared(home, FILES, "all")
    report = prepared(home, f"max_tokens = {limit}\n{FILES}", "some")
    whole, some = held(home / "all", "train"), held(home / "some", "train")
    assert some == whole[: len(some)]
    tokens = read_manifest(home / "some").splits["train"].tokens
    assert tokens == sum(len(each) + 1 for each in some) <= limit < tokens + len(whole[len(some)]) + 1
    held_out = held(home / "some", "validation")
    assert held_out == held(home / "all", "validation")[: len(held_out)]
    assert report.documents_in == sum(report.documents_out.values()) + sum(report.dropped.values()) == 300
    assert report.dropped["beyond max_tokens"] > 0
    assert main(["data", "verify", "some"]) == 0


def test_what_is_beyond_the_limit_is_not_tokenized(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    write = build._write_shards
    monkeypatch.setattr(build, "_write_shards", lambda work, folder: (built.append(work.index), write(work, folder)))
    prepared(home, f"max_tokens = 3000\n{FILES}", "some")
    assert built == [0, 1, 2]


def test_the_limit_gives_the_same_bytes_whoever_works_and_wherever_it_is_killed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"max_tokens = 9000\n{FILES}"
    prepared(home, body, "one")
    prepared(home, body, "pool", workers=2)
    assert content(home / "pool") == content(home / "one")
    monkeypatch.setattr("nmoe.effects.data.prepare.prep.commit", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(home, body, "again")
    monkeypatch.undo()
    monkeypatch.chdir(home)
    prepared(home, body, "again")
    assert content(home / "again") == content(home / "one")


def killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_limit_below_one_document_is_refused(home: Path) -> None:
    with pytest.raises(InputError, match="max_tokens: expected at least one document of the training split, got 3; "):
        prepared(home, f"max_tokens = 3\n{FILES}", "some")


def as_parquet(home: Path) -> None:
    for path in sorted((home / "in").glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        pq.write_table(pa.Table.from_pylist(records), path.with_suffix(".parquet"), row_group_size=30)
        path.unlink()


@pytest.mark.parametrize("parquet", [False, True])
def test_a_streamed_set_gives_what_its_files_give(home: Path, parquet: bool) -> None:
    prepared(home, FILES, "files")
    if parquet:
        as_parquet(home)
    report = prepared(home, STREAM + 'id_field = "id"\n', "stream")
    for split in ("train", "validation", "test"):
        assert held(home / "stream", split) == held(home / "files", split)
    assert report.documents_in == 300 and not (home / "stream" / ".work").exists()


def test_a_stream_ends_at_the_limit_and_a_finished_one_is_not_read_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"max_tokens = 4000\n{STREAM}"
    report = prepared(home, body, "some")
    assert 3900 < report.tokens_out["train"] <= 4000 and report.documents_in < 100
    monkeypatch.setattr(stream, "open_set", killed)
    assert prepared(home, body, "some") == report
    with pytest.raises(InputError, match=r"expected max_tokens = 4000 of the source, .* got 5000; "):
        prepared(home, f"max_tokens = 5000\n{STREAM}", "some")


def test_a_stream_that_breaks_goes_on_where_it_broke(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(home, STREAM, "whole")
    opened, read = stream.open_set, list[str]()

    def breaking(said: Any) -> Any:
        made = opened(said)
        records: Iterator[dict[str, Any]] = iter(made)

        class Broken:
            state_dict = made.state_dict

            def __iter__(self) -> Iterator[dict[str, Any]]:
                for record in records:
                    read.append(record["id"])
                    if len(read) == 150:
                        raise ConnectionResetError("the network is gone")
                    yield record

        return Broken()

    monkeypatch.setattr(stream, "open_set", breaking)
    with pytest.raises(
        InputError, match="in: expected a data set that can be streamed, got the network is gone; start"
    ):
        prepared(home, STREAM, "again")
    monkeypatch.undo()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    parts = sorted(path.name for path in (home / "again" / ".work" / "stream").glob("*/part-*"))
    assert len(parts) == 6
    prepared(home, STREAM, "again")
    assert content(home / "again") == content(home / "whole")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("[input]\nkind = 'stream'\ndataset = 'absent/set'\n", "absent/set: expected a data set that can be streamed"),
        (f"{STREAM}split = 'dev'\n", "in: expected a data set that can be streamed, got .*dev"),
        (f"{STREAM}text_field = 'body'\n", "in: expected a key body, got id, text, other; set input.text_field"),
    ],
)
def test_a_stream_that_can_not_be_read_is_refused(
    home: Path, body: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=expected):
        prepared(home, body, "out")


def test_a_stream_trains_no_tokenizer_and_is_not_for_a_job_array(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source_file(home, STREAM)
    assert main(["data", "tokenizer", "train", str(path), "--name", "new"]) == 2
    assert "in: expected a source of files to train a tokenizer on, got a stream; " in capsys.readouterr().err
    assert main(["data", "prep", str(path), "out", "--worker", "0/2"]) == 2
    assert "--worker: expected files that each worker can read, got a stream; use --workers" in capsys.readouterr().err
