"""ASGI middleware that every request passes; knows no dialect and no body's content."""
