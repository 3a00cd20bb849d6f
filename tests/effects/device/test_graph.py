"""A recorded step without a GPU: when its graph is destroyed."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from nmoe.effects.device import graph


class Graph:
    """One that counts."""

    def __init__(self) -> None:
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_is_destroyed_before_what_was_opened_earlier_closes(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """NCCL waits for it for ever; after an error nobody waits, and the device may have trapped."""
    recorded, found = Graph(), list[int]()
    monkeypatch.setattr(graph, "record", lambda *_: SimpleNamespace(graph=recorded))
    monkeypatch.setattr(graph, "replay", lambda *_: ("replayed", None))
    monkeypatch.setattr(graph.torch.cuda, "synchronize", lambda: None)

    def compute(*_: Any) -> Any:
        return "computed", None

    def train() -> list[str]:
        with ExitStack() as scope:
            scope.callback(lambda: found.append(recorded.resets))  # the process groups
            step = graph.replaying(compute, scope)
            steps = [step(None, None, None)[0] for _ in range(4)]
            assert recorded.resets == 0
            if fails:
                raise OSError("a peer is gone")
            return steps

    if fails:
        with pytest.raises(OSError, match="a peer"):
            train()
    else:
        assert train() == ["computed"] * graph.EAGER_STEPS + ["replayed"] * 2
    assert found == [0 if fails else 1] and recorded.resets == found[0]
