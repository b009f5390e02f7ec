"""What the fork server imports first, and no other process: it lives as long as its parent does.

A group's SIGTERM, from a terminal or a service manager, is the parent's to handle.
"""

from __future__ import annotations

import signal

from app.worker import child as child

signal.signal(signal.SIGTERM, signal.SIG_IGN)
