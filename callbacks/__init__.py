"""Lightning callbacks and loggers: checkpoints, moving average, metrics, progress, image grids, Weights & Biases."""
