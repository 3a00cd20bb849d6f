"""`nmoe viz` as a process of its own, for tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Server:
    """A running server."""

    url: str
    port: int
    process: subprocess.Popen[str]

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
        """Code and text of an answer."""
        return self._answer(urllib.request.Request(self.url + path, method=method), headers)

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str]:
        """Code and text of the answer to a body."""
        return self._answer(urllib.request.Request(self.url + path, data=body, method="POST"), headers)

    def _answer(self, request: urllib.request.Request, headers: Mapping[str, str]) -> tuple[int, str]:
        for name, value in headers.items():
            request.add_header(name, value.encode().decode("latin-1"))
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def json(self, path: str) -> Any:
        """An answer that must be good."""
        code, text = self.get(path)
        assert code == 200, text
        return json.loads(text)


@contextmanager
def serving(root: Path, *arguments: str) -> Iterator[Server]:
    """A server of the runs in `root` on a free port; stopped at the end, having said nothing on stderr."""
    command = [sys.executable, "-m", "nmoe", "viz", "--runs", str(root), "--port", "0", *arguments]
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NMOE_HOME": home},
        ) as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        try:
            said = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
            assert found, said + process.stderr.read()
            yield Server(url=found[0].rstrip("/"), port=int(found[1]), process=process)
        finally:
            process.terminate()
            errors = process.stderr.read()
        assert "Traceback" not in errors, errors
