"""From a protocol's requests to a manifest of images: systems, conditions, references."""
