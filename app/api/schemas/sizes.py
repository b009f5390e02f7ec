"""The rule about sizes, which is everyone's: `app.limits`."""

from app.limits import MAX_RATIO, STEP, SizeRule

__all__ = ["MAX_RATIO", "STEP", "SizeRule"]
