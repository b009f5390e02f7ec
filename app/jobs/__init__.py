"""Queue, fairness, prediction and dispatch in pure asyncio; knows no worker and no HTTP."""
