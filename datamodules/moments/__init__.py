"""The VAE's moments of target images, computed once and kept beside the shards, so that stage 3 encodes nothing."""
