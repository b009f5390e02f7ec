"""Memory plans, offloading and layer streaming; knows no pipeline and no jobs."""
