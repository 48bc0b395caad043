"""Tiny pretrained models: Toyland's own Stable Diffusion, CLIP, DINO and judge (also FID's network), and how they are trained.

`python -m datamodules.toyland.pretrained` draws a pool of images, trains each model and writes it in the folder format
of its full-size original, in half precision. KOSMOS-G then loads them as it loads SD v1.5 and CLIP ViT-L/14.
"""
