"""Health, metrics, models, OpenAPI document and playground; no route here makes an image."""
