"""Tiny pretrained models for Toyland: Stable Diffusion, CLIP, DINO, and a judge that is also the network of FID.

`python -m datamodules.toyland.pretrained` draws a pool of images, trains the models and saves them in the folder format
of their full-size originals, in half precision. KOSMOS-G loads them in the same way as SD v1.5 and CLIP ViT-L/14.
"""
