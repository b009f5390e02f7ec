"""How much of the queue one client may hold, and for whom places are kept free.

Order alone is not fair: whoever asks most often gets every place that comes free. So a client holds
at most three quarters of the places while it is not alone, and who was turned away within its own
share has a claim: the next places that come free are kept for it until it has come back, or has had
the time to. Claims keep no more than a quarter of the places, or what the first of them needs.
Where it is not places that are short but time, since all would not be ready by their deadlines, the
time that the first needs is kept likewise, but no more than a quarter of what the asker's deadline
leaves beside its own work. So an idle card is kept from nobody, and the queue lends it a place
that no claim counts for. Nothing that was accepted is ever touched.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from app.limits import three_quarters

PRESENT_S = 30.0
"""Seconds for which a client counts as being there once it has asked, or should have come back."""
CLAIMS_MOST = 64
"""Claims at a time: each request looks at all that come before its own."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What somebody was turned away with: for want of places, or of time on the card."""

    images: int
    work_s: float
    until: float


class Shares:
    """Knows who asked lately and who was turned away. *capacity* is the number of places."""

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = three_quarters(capacity)
        """Places that one client may hold while it is not alone."""
        self._kept_most = max(1, capacity - self.most)
        self._claims_most = min(capacity, CLAIMS_MOST)
        self._clock = clock
        self._claims: OrderedDict[str, _Claim] = OrderedDict()
        # Of those who asked, the last and the last before it: enough to tell who is alone.
        self._asker, self._asked_at, self._other_asked_at = "", -math.inf, -math.inf

    def __repr__(self) -> str:
        return f"<Shares of at most {self.most}, {len(self._claims)} claims>"

    def note(self, client: str) -> None:
        """*client* asks."""
        if client != self._asker:
            self._asker, self._other_asked_at = client, self._asked_at
        self._asked_at = self._clock()

    def is_alone(self, client: str) -> bool:
        """Whether nobody but *client* has asked lately, or was told to come back about now."""
        now = self._clock()
        asked_at = self._other_asked_at if client == self._asker else self._asked_at
        return now - asked_at >= PRESENT_S and not any(
            name != client and claim.until > now for name, claim in self._claims.items()
        )

    def claim(
        self, client: str, retry_after_s: float, *, images: int = 0, work_s: float = 0.0
    ) -> None:
        """*client* was turned away for want of places for *images*, or of *work_s* seconds of the
        card, and told to come back in *retry_after_s*. Where it was before, its turn stays what it
        is."""
        before = self._claims.get(client)
        if before is not None:
            images, work_s = images or before.images, work_s or before.work_s
        elif len(self._claims) >= self._claims_most:
            return
        until = self._clock() + retry_after_s + PRESENT_S
        self._claims[client] = _Claim(images, work_s, until)

    def hold_claim(self, client: str) -> None:
        """*client* has got its places, and perhaps not the time yet: it keeps its turn alone."""
        if (claim := self._claims.get(client)) is not None:
            self._claims[client] = replace(claim, images=0)

    def end_claim(self, client: str) -> None:
        """*client* has got all that it asked for, or wants it no more."""
        self._claims.pop(client, None)

    def kept(self, client: str) -> int:
        """How many places are kept from *client*: for those who were turned away before it was."""
        kept = 0
        for claim in self._before(client):
            if kept >= self._kept_most:
                break
            kept = min(self._kept_most, kept + claim.images) if kept else claim.images
        return min(kept, self.most)

    def kept_s(self, client: str, spare_s: float) -> float:
        """How many seconds of the card are kept from *client*, who has *spare_s* beside its own
        work: for the first who was turned away for want of them before it was."""
        wanted_s = next((claim.work_s for claim in self._before(client) if claim.work_s), 0.0)
        return min(wanted_s, spare_s / 4)

    def _before(self, client: str) -> Iterator[_Claim]:
        """The claims that come before any of *client*, the eldest first."""
        now = self._clock()
        while self._claims and next(iter(self._claims.values())).until <= now:
            self._claims.popitem(last=False)
        for name, claim in self._claims.items():
            if name == client:
                break
            if claim.until > now:
                yield claim
