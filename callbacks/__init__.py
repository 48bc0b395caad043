"""What watches a run: checkpoints, pictures, throughput, progress, logs, the export at the end."""
