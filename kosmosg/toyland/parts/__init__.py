"""The third-party parts in miniature: how Toyland's tiny Stable Diffusion, CLIP, DINO and FID network are made.

`python -m kosmosg.toyland.parts` draws a pool of pictures, trains each part and writes it in the folder format of its
full-size original, in half precision. KOSMOS-G then loads them as it loads SD v1.5 and CLIP ViT-L/14.
"""
