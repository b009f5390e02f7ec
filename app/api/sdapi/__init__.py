"""AUTOMATIC1111's API under `/sdapi/v1/`, as far as its clients use it to get pictures."""
