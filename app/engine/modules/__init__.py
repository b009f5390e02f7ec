"""Building blocks of the networks: attention, RoPE, layers; knows no files, pipeline or jobs."""
