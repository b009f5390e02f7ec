"""`klein compare`: one image at several precisions; knows no torch and no HTTP."""
