"""The GPU process and the parent's side of it; knows no queue and no HTTP."""
