"""A page to try a model: prompts with images in them, drawn, steered and repeated in a browser (gradio).

One request is drawn at a time, the others wait in a queue. Each picture is a PNG as `kosmosg generate` writes it: its
metadata say how it was made, the page gives the command that makes it again, and dropped into the page it restores its
settings. Images are numbered; `<2>` in a prompt is the second.

`requests.py` is what the page does, `page.py` how it looks, `run.py` the gallery of a training run.
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
