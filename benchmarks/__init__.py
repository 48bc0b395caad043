"""What our ways of doing the work gain over the released code's, measured side by side.

Each benchmark is a module with `measure(arguments) -> dict`; `arguments` are YAML files and `key=value` over a size of
`benchmarks/sizes/`. Two ways take turns in one process, so that a slow minute of the machine hits both alike; every
ratio is a median over pairs of neighbours, with a bootstrap interval.
"""
