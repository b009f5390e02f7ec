"""Validation that both APIs share: fields, bodies, uploads; knows neither API."""
