"""Encode and decode image files: the only room that knows their formats; no HTTP, no torch.

`formats` makes the response's file; `uploads` validates and decodes what a client sends, in the
processes of `pool`.
"""

from app.images.formats import OutputFormat, encode

__all__ = ["OutputFormat", "encode"]
