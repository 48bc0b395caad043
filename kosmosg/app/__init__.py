"""A gradio page to try a model: prompts with images in them, masks, previews and comparison of models.

Requests are drawn one at a time. Each image is the PNG that `kosmosg generate` writes: the page gives the command that
reproduces it, and restores the settings of a PNG that is dropped in. Prompts refer to images by number, such as `<2>`.

`requests.py` holds the logic, `page.py` the layout and events, and `run.py` the view of a training run.
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when imported
