"""What asks a service that runs already, over HTTP; imports neither torch nor the service."""
