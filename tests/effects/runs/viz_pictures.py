"""The pictures of the dashboard in docs/: real trainings of the quickstart, and the page in a browser.

    python -m tests.effects.runs.viz_pictures FOLDER
    python -m tests.effects.runs.viz_pictures FOLDER records/cpu VARIANT VARIANT ...

FOLDER keeps the runs; those that are there are not trained again. On two CPU cores it takes about ten minutes.
The second form draws seed 0 of variants whose results `nmoe bench records` put into FOLDER.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.effects.runs.viz_page import opened
from tests.effects.runs.viz_server import serving

DOCS = Path(__file__).resolve().parents[3] / "docs"
STEPS = 240
COMMON = (f"--train.steps={STEPS}", "--schedule.warmup=0.06", "--schedule.decay=0.6", "--validation.every=40")
RUNS = {
    "adamw": (),
    "adamw-lr-2e-3": ("--optim.dense.lr=2e-3", "--optim.expert.lr=2e-3", "--optim.router.lr=2e-3"),
    "muon": ("--optim.dense.optimizer=muon", "--optim.expert.optimizer=muon"),
}
METRICS = "^loss|grad_norm|validation/"
CHARTS = f"view=charts&run=adamw&run=adamw-lr-2e-3&run=muon&events=none&smooth=20&tags={METRICS}"
EXPERTS = "view=experts&run=muon&one=muon&layer=2"
STUDY = "view=charts&events=none&smooth=40&tags=^loss|validation/bits&{}"


def train(root: Path) -> None:
    """Train the runs that are not there. Writes: run folders."""
    for name, options in RUNS.items():
        if not (root / name).exists():
            where = (f"--run.root={root}", f"--run.name={name}", "--log.every=2", "--log.arrays_every=2")
            command = [sys.executable, "-m", "nmoe", "run", "quickstart", *where, *COMMON, *options]
            subprocess.run(command, check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})


def picture(root: Path, folder: Path, views: tuple[tuple[str, str], ...]) -> None:
    """Open views of the runs: name and address of each. Writes: the pictures in `folder`."""
    with sync_playwright() as playwright, serving(root) as server:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for name, query in views:
            view = {"width": 1440, "height": 900}
            with opened(browser, f"{server.url}/?{query}&theme=light", viewport=view) as page:
                page.screenshot(path=folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    runs = Path(sys.argv[1]).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) == 2:
        train(runs)
        picture(runs, DOCS, (("viz-charts", CHARTS), ("viz-experts", EXPERTS)))
    else:
        chosen = [f"run={path.name}" for name in sys.argv[3:] for path in runs.glob(f"{name}-s0-*")]
        picture(runs, DOCS, ((sys.argv[2], STUDY.format("&".join(chosen))),))
