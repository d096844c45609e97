"""Which pieces of a download are still to be had, and which are being fetched. It knows nothing of peers or bytes.

Invariant: a piece is waiting, in work, or done; it is in work at two sources only if the first of them is slow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import islice

HEDGE_SECONDS = 3.0
"""How long a claim may be in work before an idle source is asked for the same."""


class Board:
    """Used by the threads of all sources."""

    def __init__(self, pieces: int) -> None:
        self.changed = threading.Condition()
        self.waiting = dict.fromkeys(range(pieces))
        self.flying: dict[int, tuple[float, int]] = {}
        """Since when, and by how many."""
        self.stopped = False

    @property
    def complete(self) -> bool:
        with self.changed:
            return not self.waiting and not self.flying

    def take(self, most: int, workers: int, lacks: set[int]) -> list[int]:
        """The next pieces for a source that lacks some. It waits while others are at work; nothing: nothing to do."""
        with self.changed:
            while not self.stopped:
                now = time.monotonic()
                # Smaller claims towards the end, so that all sources end together.
                length = max(1, min(most, -(-len(self.waiting) // (2 * workers))))
                if claim := list(islice((piece for piece in self.waiting if piece not in lacks), length)):
                    for piece in claim:
                        del self.waiting[piece]
                        self.flying[piece] = (now, 1)
                    return claim
                there = [piece for piece in self.flying if piece not in lacks]
                if not there:
                    return []
                slow = [p for p in there if self.flying[p][1] == 1 and now - self.flying[p][0] > HEDGE_SECONDS]
                for piece in slow[:most]:
                    self.flying[piece] = (self.flying[piece][0], 2)
                if slow:
                    return slow[:most]
                self.changed.wait(0.25)
            return []

    def arrived(self, piece: int) -> bool:
        """Counts a verified piece; false if another source was first."""
        with self.changed:
            first = piece in self.flying or piece in self.waiting
            self.flying.pop(piece, None)
            self.waiting.pop(piece, None)
            self.changed.notify_all()
            return first

    def back(self, pieces: Sequence[int]) -> None:
        """Gives back what did not come, for others to take."""
        with self.changed:
            for piece in pieces:
                since, at_work = self.flying.get(piece, (0.0, 0))
                if at_work == 1:
                    del self.flying[piece]
                    self.waiting[piece] = None
                elif at_work > 1:
                    self.flying[piece] = (since, at_work - 1)
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
