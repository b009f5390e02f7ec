"""Admission, tickets and results; knows no HTTP and no torch."""
