"""Shapes that have to agree: what would broadcast, or be cut off, in silence is refused."""

from __future__ import annotations

from collections.abc import Sequence


def expect_shape(what: str, got: Sequence[int], shape: Sequence[int], remedy: str) -> None:
    """Compare a shape with the one that is needed; both are known to the host, which waits for nothing.

    what     beginning of the message, up to the name of the argument: "rms_norm: expected a gain"
    remedy   end of the message
    Raises:  ValueError when they differ.
    """
    if tuple(got) != tuple(shape):
        raise ValueError(f"{what} of shape {list(shape)}, got {list(got)}; {remedy}")


def expect_divisor(what: str, number: int, whole: int, of: str) -> None:
    """Refuse parts that are not equal.

    what     beginning of the message, up to what the divisor counts: "layout: expected ranks"
    of       what is divided, in the plural
    Raises:  ValueError when `number` is not positive or does not divide `whole`.
    """
    if number < 1 or whole % number:
        raise ValueError(f"{what} that divide the {whole} {of}, got {number}; take a divisor")


def expect_member(what: str, index: int, count: int) -> None:
    """Refuse an index outside 0 to `count` - 1, which a slice would turn into nothing or into another part.

    what     beginning of the message, up to the name of the index: "initial: expected rank"
    Raises:  ValueError for any other.
    """
    if not 0 <= index < count:
        raise ValueError(f"{what} from 0 to {count - 1}, got {index}; ranks are counted from 0")
