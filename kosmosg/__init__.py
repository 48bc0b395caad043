"""KOSMOS-G: interleaved images and text as the prompt of a frozen Stable Diffusion (arXiv 2310.02992).

What a user of the model imports: tokenizer, prompt, models, losses, pipeline, checkpoint conversion.
"""
