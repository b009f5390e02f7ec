"""The registered models as data: specifications and published files; knows no torch, no network."""
