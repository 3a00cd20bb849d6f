"""Run the steps of a Dockerfile in a root file system, where there is no builder of images:

    python docker/in_root.py docker/cpu.Dockerfile ROOT

ROOT is a folder that stands for what FROM names: Debian's Python by debootstrap, with pip allowed to install into it.

    debootstrap --variant=minbase --include=ca-certificates,python3-pip,python3-venv bookworm ROOT
    rm ROOT/usr/lib/python3.11/EXTERNALLY-MANAGED

COPY takes what git tracks. RUN, and CMD at the end, are run by chroot, which root alone may.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def steps(file: Path) -> list[tuple[str, str]]:
    """Word and arguments of every instruction, on one line each."""
    text = re.sub(r"^#.*\n", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def copy(sources: list[str], target: Path) -> None:
    """Copy tracked files, and all of folders. Writes: below `target`."""
    for source in sources:
        found = subprocess.run(["git", "ls-files", "-z", source], cwd=CHECKOUT, capture_output=True, check=True).stdout
        for name in found.decode().split("\0")[:-1]:
            to = target / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, to, follow_symlinks=False)


def run(root: Path, where: str, user: str, environ: dict[str, str], command: str) -> None:
    """Run a command in the root, as a user. Raises: CalledProcessError when it fails."""
    print(f"--- {user or 'root'} in {where}: {command}", flush=True)
    home = {"HOME": "/home/nmoe" if user else "/root"}
    line = f"cd {shlex.quote(where)} && {command}"
    chroot = ["chroot", *([f"--userspec={user}:{user}"] if user else []), str(root), "/bin/sh", "-ec", line]
    subprocess.run(chroot, env={**os.environ, **environ, **home}, check=True)


def main(file: Path, root: Path) -> None:
    """Every instruction in its order, CMD included."""
    where, user, environ = "/", "", dict[str, str]()
    for word, rest in steps(file):
        if word == "WORKDIR":
            where = rest
            (root / where.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = shlex.split(rest)
            folder = root / os.path.join(where, target).lstrip("/")
            # of a folder alone Docker copies what is in it; here all are named as in the checkout
            copy(sources, folder.parent if sources == [target] else folder)
        elif word == "RUN":
            run(root, where, user, environ, rest)
        elif word == "ENV":
            environ |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "USER":
            user = rest
        elif word == "CMD":
            run(root, where, user, environ, shlex.join(json.loads(rest)))
        elif word != "FROM":
            raise SystemExit(f"{file}: expected instructions known to {sys.argv[0]}, got {word}; add it")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).resolve())
