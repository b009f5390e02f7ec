"""The catalogue's files on disk: download, verification, trust; knows no tensors and no GPU."""
