"""The pipeline's stages from prompt to pixels, and its assembly; knows no queue and no HTTP."""
