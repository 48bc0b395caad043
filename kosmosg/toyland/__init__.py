"""Toyland: a small drawn world with everything KOSMOS-G needs to be trained and judged in miniature."""
