"""`klein bench`: measures the service without HTTP; knows no torch."""
