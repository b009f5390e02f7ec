"""Validation that both dialects share: fields, bodies, uploads; knows neither dialect."""
