"""Which dead blocks a freeing round takes, and which servers it asks. Events in, decisions out; no I/O, no clock.

A block is forgotten when every server of its row that is up has deleted it. One that does not delete (its index takes
nothing, its answers are late) must not hold up the others: its blocks are left behind, and it is asked again later and
later. A round takes some of the blocks that have died since the last one, and some of those left behind, so neither
waits for the other. All this is memory: after a restart of the meta server everything is new again.
"""

import msgspec

from mendfs.meta.freeing import DeadBlock
from mendfs.model import BlockId, Partition, ServerNumber

RETRY_MIN_S = 2.0
"""Twice a round: the usual reason is a server that is just being started again."""
RETRY_MAX_S = 60.0
"""A server that waits for its call's deadline each time costs a round in this 5 s."""

Orders = dict[ServerNumber, list[tuple[Partition, BlockId]]]


class _Refusal(msgspec.Struct):
    """A server that did not delete."""

    again_s: float
    pause_s: float


class Rounds:
    """The freeing rounds of one meta server. Times are of the event loop."""

    def __init__(self) -> None:
        self.front: DeadBlock | None = None
        """Up to here every dead block was in a round."""
        self._late: DeadBlock | None = None
        """The same for those left behind, in the present pass over them."""
        self._is_passing = False
        self._are_left = False
        """Some blocks were left behind since the present pass began, or the last one."""
        self._refusals: dict[ServerNumber, _Refusal] = {}
        self._have_refused: set[ServerNumber] = set()
        """Since nothing was left behind, and those not asked now: who else has deleted all that was in a round."""

    @property
    def is_waiting(self) -> bool:
        """Whether blocks were left behind: then there must be more rounds, even if nothing dies."""
        return self._are_left or self._is_passing

    def may_ask(self, server: ServerNumber, at_s: float) -> bool:
        """Whether a server gets orders now."""
        refusal = self._refusals.get(server)
        return refusal is None or refusal.again_s <= at_s

    def obeyed(self, server: ServerNumber) -> None:
        """It deleted, or is down: then what it keeps is garbage, found when it is back."""
        self._refusals.pop(server, None)

    def refused(self, server: ServerNumber, at_s: float) -> None:
        """It did not delete what it was asked to."""
        before = self._refusals.get(server)
        pause_s = RETRY_MIN_S if before is None else min(2 * before.pause_s, RETRY_MAX_S)
        self._refusals[server] = _Refusal(at_s + pause_s, pause_s)
        self._have_refused.add(server)

    def has_refused(self, server: ServerNumber) -> bool:
        """Whether it may not have deleted something that was left behind."""
        return server in self._have_refused

    def late_range(self, at_s: float) -> tuple[DeadBlock | None, DeadBlock] | None:
        """After which and up to which dead block those left behind are looked for now; None: they have to wait.

        A pass over them begins when a server may be asked again, and goes on over several rounds.
        """
        if not self.is_waiting or self.front is None:
            return None
        if not self._is_passing:
            if self._refusals and not any(self.may_ask(server, at_s) for server in self._refusals):
                return None
            self._is_passing, self._late, self._are_left = True, None, False
        return self._late, self.front

    def took_late(self, last: DeadBlock | None) -> None:
        """Those up to `last` were looked at; None: the pass has come to its end."""
        self._late = last
        self._is_passing = last is not None
        if not self.is_waiting:
            # Who is not asked now has not deleted what will be left behind next.
            self._have_refused.intersection_update(self._refusals)

    def left_behind(self) -> None:
        """A block of a round was not forgotten, for a server has not deleted it."""
        self._are_left = True

    def took_fresh(self, last: DeadBlock) -> None:
        """Those up to `last` were in a round."""
        self.front = last
