"""The networks of KOSMOS-G; see docs/architecture.md for the way through them."""
