"""Looking at shards: what is usable, how well they are shuffled, and a sheet of samples."""
