"""`klein doctor`: facts, checks, report; changes nothing and starts no worker."""
