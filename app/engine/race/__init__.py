"""The race at the first start: which 8-bit format and attention kernel is fastest on this card."""
