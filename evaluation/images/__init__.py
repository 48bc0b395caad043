"""Systems, and the generation of their images; images of other models."""
