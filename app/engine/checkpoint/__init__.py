"""Reading and checking checkpoints in every supported layout; knows no network and no GPU plan."""
