"""Looking at shards: counts, histograms, what is unusable and why, and a sheet of pictures to look at."""
