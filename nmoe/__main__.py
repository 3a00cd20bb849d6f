"""`python -m nmoe`."""

from __future__ import annotations

import sys

from nmoe.cli import main

sys.exit(main())
