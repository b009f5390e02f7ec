"""The command line: one module or package per command; knows no HTTP request."""
