"""Forward passes: exact, fused, as CUDA graphs; knows no pipeline, jobs or hub."""
