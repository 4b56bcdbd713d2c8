"""The geometry of an update between checkpoints on disk, whoever trained them."""
