"""The networks of KOSMOS-G. docs/architecture.md shows how they fit together."""
