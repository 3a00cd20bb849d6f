"""Names of the files and folders of a run folder."""

from __future__ import annotations

CHECKPOINTS = "checkpoints"
