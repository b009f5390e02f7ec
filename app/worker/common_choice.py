"""Has all workers of a service compute alike, so that a seed's pixels do not depend on the card."""

from __future__ import annotations

import logging
from dataclasses import replace

from app.domain import ModelInfo
from app.worker.pool import Pool, Worker

_log = logging.getLogger(__name__)


class CommonChoice:
    """The precision and the attention that the first worker that was ready has chosen.

    Where cards differ that is the oldest: what runs there, newer ones run too. One that loaded at
    the same time and chose otherwise, since its race was disturbed, is loaded again, once.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._chosen: ModelInfo | None = None
        self._loaded_again: set[Worker] = set()

    def admits(self, worker: Worker, info: ModelInfo) -> bool:
        """Return whether *worker*, which has just become ready, may serve; else it loads again."""
        chosen = self._chosen
        if chosen is None:
            self._chosen = info
            for each in self._pool.workers:
                config = each.supervisor.config
                each.supervisor.config = replace(
                    config,
                    precision=info.precision,
                    attention=info.attention_choice or config.attention,
                )
            return True
        is_alike = (info.precision, info.attention) == (chosen.precision, chosen.attention)
        # One that cannot is better than none: /health shows what each computes with.
        if is_alike or worker in self._loaded_again:
            return True
        self._loaded_again.add(worker)
        _log.warning(
            "%s (%s) chose %s with attention by %s, the first %s by %s: it is loaded again.",
            worker.device.name,
            worker.device.uuid,
            info.precision,
            info.attention,
            chosen.precision,
            chosen.attention,
        )
        self._pool.load_again(worker)
        return False
