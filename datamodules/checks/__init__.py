"""Check shards: which samples are usable, how well they are shuffled, and a contact sheet."""
