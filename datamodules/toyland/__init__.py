"""Toyland on disk: what real data would be, written by the same writer and read by the same DataModules.

    python -m datamodules.toyland [more.yaml | key=value …]

writes shards of all five kinds of sample, a DreamBench folder of held-out subjects and a COCO folder of fresh scenes.
"""
