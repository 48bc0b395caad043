"""Tiny pretrained models: Toyland's own Stable Diffusion, CLIP, DINO and a judge, which is FID's network too.

`python -m datamodules.toyland.pretrained` draws a pool of images, trains each model and writes it in the folder format
of its full-size original, in half precision. KOSMOS-G then loads them as it loads SD v1.5 and CLIP ViT-L/14.
"""
