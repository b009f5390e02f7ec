"""Connections and their limits; knows no routes and no fields of a request."""
