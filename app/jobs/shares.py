"""How much of the queue one client may hold, and for whom places are kept free.

Order alone is not fair: whoever asks most often gets every place that is freed. So a client holds
at most three quarters of the places while it is not alone, and a client that was refused within its
own share has a claim: the next freed places are kept for it until it has come back, or has had the
time to. Claims keep no more than a quarter of the places, or what the first of them needs. Where
not places are short but time, since not all jobs would meet their deadlines, the time that the
first claim needs is kept likewise, but no more than a quarter of what the requester's deadline
leaves beside its own work. So an idle GPU is kept from nobody, and the queue lends it a place that
no claim counts for. Accepted jobs are never affected.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from app.limits import three_quarters

PRESENT_S = 30.0
"""Seconds for which a client counts as present once it has asked, or should have come back."""
CLAIMS_MOST = 64
"""Limit of claims: each request looks at all that come before its own."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a client was refused: places, or seconds of GPU time."""

    images: int
    work_s: float
    until: float


class Shares:
    """Knows which clients asked lately and which were refused; *capacity* counts places."""

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = three_quarters(capacity)
        """Places that one client may hold while it is not alone."""
        self._kept_most = max(1, capacity - self.most)
        self._claims_most = min(capacity, CLAIMS_MOST)
        self._clock = clock
        self._claims: OrderedDict[str, _Claim] = OrderedDict()
        # The last client that asked and the last other one: enough to tell which is alone.
        self._asker, self._asked_at, self._other_asked_at = "", -math.inf, -math.inf

    def __repr__(self) -> str:
        return f"<Shares of at most {self.most}, {len(self._claims)} claims>"

    def note(self, client: str) -> None:
        """Record that *client* asks."""
        if client != self._asker:
            self._asker, self._other_asked_at = client, self._asked_at
        self._asked_at = self._clock()

    def is_alone(self, client: str) -> bool:
        """Return whether no other client has asked lately, or was told to come back about now."""
        now = self._clock()
        asked_at = self._other_asked_at if client == self._asker else self._asked_at
        return now - asked_at >= PRESENT_S and not any(
            name != client and claim.until > now for name, claim in self._claims.items()
        )

    def claim(
        self, client: str, retry_after_s: float, *, images: int = 0, work_s: float = 0.0
    ) -> None:
        """Record that *client* was refused *images* places, or *work_s* seconds of GPU time.

        It was told to come back in *retry_after_s*. Where it has a claim already, its turn is
        unchanged.
        """
        before = self._claims.get(client)
        if before is not None:
            images, work_s = images or before.images, work_s or before.work_s
        elif len(self._claims) >= self._claims_most:
            return
        self._claims[client] = _Claim(images, work_s, self._clock() + retry_after_s + PRESENT_S)

    def hold_claim(self, client: str) -> None:
        """Keep the claim of *client* on time only: it has got its places."""
        if (claim := self._claims.get(client)) is not None:
            self._claims[client] = replace(claim, images=0)

    def end_claim(self, client: str) -> None:
        """Drop the claim of *client*: it has got all that it asked for, or disconnected."""
        self._claims.pop(client, None)

    def kept(self, client: str) -> int:
        """Return how many places are kept from *client*, for claims older than its own."""
        wanted = [claim.images for claim in self._before(client) if claim.images]
        first = wanted[0] if wanted else 0
        return min(self.most, max(first, min(self._kept_most, sum(wanted))))

    def kept_s(self, client: str, spare_s: float) -> float:
        """Return the seconds of GPU time kept from *client*, for the first older claim on time.

        *spare_s* is what the deadline of *client* leaves beside its own work.
        """
        wanted_s = next((claim.work_s for claim in self._before(client) if claim.work_s), 0.0)
        return min(wanted_s, spare_s / 4)

    def _before(self, client: str) -> Iterator[_Claim]:
        """Yield the claims older than that of *client*, the oldest first."""
        now = self._clock()
        while self._claims and next(iter(self._claims.values())).until <= now:
            self._claims.popitem(last=False)
        for name, claim in self._claims.items():
            if name == client:
                break
            if claim.until > now:
                yield claim
