"""Several machines by Ray Serve: each replica is this service itself, behind Serve's proxy."""
