"""What the fork server imports first, and no other process: it lives as long as its parent does.

Signals that a terminal or a service manager sends to the whole group are the parent's to handle,
while modules are imported too.
"""

from __future__ import annotations

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)

from app.worker import child as child  # noqa: E402 - after the signals
