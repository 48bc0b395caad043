"""From images to features, scores, intervals and results."""
