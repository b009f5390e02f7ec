"""Forward passes: exact, fused, compiled, as CUDA graphs; knows no pipeline, jobs or hub."""
