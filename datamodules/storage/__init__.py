"""Shards: tar files, their indexes, local and remote."""
