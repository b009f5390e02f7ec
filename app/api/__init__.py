"""HTTP: routes, limits and errors; knows no torch and no worker process."""
