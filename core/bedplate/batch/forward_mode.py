# SPDX-License-Identifier: Apache-2.0
"""What kind of pass a batch is, and which hidden states it keeps.

The integer values travel between processes and are wire format; a snapshot test holds them.
"""

from __future__ import annotations

__all__ = ["CaptureHiddenMode", "ForwardMode"]

from enum import IntEnum


class ForwardMode(IntEnum):
    """Kind of one forward pass."""

    EXTEND = 1
    """New tokens on top of a cached prefix, possibly empty; users say prefill."""
    DECODE = 2
    """One new token per request."""
    MIXED = 3
    """Both kinds in one pass."""
    IDLE = 4
    """No tokens; only takes part in collectives."""
    TARGET_VERIFY = 5
    """The target model checks drafted tokens."""
    DRAFT_EXTEND = 6
    """The draft model catches up with accepted tokens."""
    DUMMY_FIRST = 7
    """Never reaches a model; kept because its number is taken."""
    SPLIT_PREFILL = 8
    """An extend pass that runs some layers at a time."""

    def is_extend(self) -> bool:
        """More than one new token per request is possible; attention is extend-shaped."""
        return self in _EXTEND_MODES

    def is_prefill(self) -> bool:
        """Same as ``is_extend``."""
        return self.is_extend()

    def is_decode(self) -> bool:
        """One new token per request."""
        return self is ForwardMode.DECODE

    def is_mixed(self) -> bool:
        """Extend and decode rows together."""
        return self is ForwardMode.MIXED

    def is_idle(self) -> bool:
        """No tokens of its own."""
        return self is ForwardMode.IDLE

    def is_decode_or_idle(self) -> bool:
        """Decode-shaped or empty."""
        return self.is_decode() or self.is_idle()

    def is_target_verify(self) -> bool:
        """Checks drafted tokens."""
        return self is ForwardMode.TARGET_VERIFY

    def is_draft_extend(self) -> bool:
        """The draft model's extend."""
        return self is ForwardMode.DRAFT_EXTEND

    def is_extend_or_draft_extend_or_mixed(self) -> bool:
        """Extend-shaped without verification."""
        return self in (ForwardMode.EXTEND, ForwardMode.DRAFT_EXTEND, ForwardMode.MIXED)

    def is_graph(self) -> bool:
        """Shapes depend on the request count alone, so the pass may be a recorded graph."""
        return self in (ForwardMode.DECODE, ForwardMode.IDLE, ForwardMode.TARGET_VERIFY)

    def is_dummy_first(self) -> bool:
        """The retired mode."""
        return self is ForwardMode.DUMMY_FIRST

    def is_split_prefill(self) -> bool:
        """Some layers at a time."""
        return self is ForwardMode.SPLIT_PREFILL


_EXTEND_MODES = frozenset(
    {
        ForwardMode.EXTEND,
        ForwardMode.MIXED,
        ForwardMode.TARGET_VERIFY,
        ForwardMode.DRAFT_EXTEND,
    }
)


class CaptureHiddenMode(IntEnum):
    """Which hidden states a pass keeps; a higher mode can stand in for a lower one."""

    NULL = 0
    """None."""
    LAST = 1
    """Of each request's last token."""
    FULL = 2
    """Of every token."""

    def need_capture(self) -> bool:
        """Anything is kept."""
        return self is not CaptureHiddenMode.NULL

    def is_full(self) -> bool:
        """Every token is kept."""
        return self is CaptureHiddenMode.FULL

    def is_last(self) -> bool:
        """Only last tokens are kept."""
        return self is CaptureHiddenMode.LAST
