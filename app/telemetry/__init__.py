"""Prometheus metrics, NVML and event-loop lag; knows no HTTP and no torch."""
