"""Toyland: a small drawn world with everything that KOSMOS-G needs to be trained and evaluated in miniature.

    python -m datamodules.toyland [more.yaml | key=value …]

writes shards of all five kinds of sample, a DreamBench folder of held-out subjects and a COCO folder of fresh scenes,
by the writer that real data go through. `brush`, `kinds`, `settings` and `scene` draw, `language` words, `samples` and
`data_sets` write; `pretrained/` trains the tiny pretrained models in `weights/`.
"""
