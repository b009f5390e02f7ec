"""klein-server: one warm FLUX.2 klein pipeline behind HTTP."""

__version__ = "0.2.0"
