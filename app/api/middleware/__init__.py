"""ASGI middleware that every request passes; knows no route's fields."""
