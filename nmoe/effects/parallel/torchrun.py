"""`nmoe-torchrun`: torchrun, with the exit code of its ranks.

torchrun itself ends with 1 whatever its ranks ended with, so that no scheduler could distinguish a preempted run, which
ended with 75, from a crash.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from nmoe.effects.parallel.launch import ORDERLY
from nmoe.effects.terminal import warn

EXIT_STOPPED = 75
"""Of a launcher that got a signal: it has ended its ranks by the same signal, and the same command resumes."""


def main() -> None:
    """Run torchrun with this process's arguments, and end as the first of its ranks that failed.

    Raises:  SystemExit with that rank's exit code, 128 + the signal that ended it, or 75 when the launcher itself got
             a signal.
    """
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code not in ORDERLY:
            warn(f"nmoe: rank {rank}: expected the end of all ranks together, got exit code {code}; see what it wrote")
        sys.exit(code)
    except SignalException:
        sys.exit(EXIT_STOPPED)
