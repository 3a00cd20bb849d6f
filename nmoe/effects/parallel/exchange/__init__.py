"""Expert parallelism by direct writes: every rank puts rows into the memory of the rank that holds their expert."""

from __future__ import annotations

from nmoe.effects.parallel.exchange.arena import Exchange, PeerError, check
from nmoe.effects.parallel.exchange.opening import open_exchange
from nmoe.pure.parallel.exchange_arena import Sizes

__all__ = ["Exchange", "PeerError", "Sizes", "check", "open_exchange"]
