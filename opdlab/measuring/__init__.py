"""The geometry of an update between checkpoints, whoever trained them."""
