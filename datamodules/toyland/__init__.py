"""Toyland: a small synthetic world with all data that KOSMOS-G needs for training and evaluation in miniature.

    python -m datamodules.toyland [more.yaml | key=value …]

writes shards of five kinds of sample, a DreamBench folder of held-out subjects and a COCO folder of new scenes, with
the same writer as for real data. `brush`, `kinds`, `settings` and `scene` draw images, `language` makes texts,
`samples` and `data_sets` write files; `pretrained/` trains the tiny pretrained models in `weights/`.
"""
