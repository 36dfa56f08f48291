"""Speed and memory against transformers' VisualBERT, reproducible with one command.

`workloads` says what is measured, `inputs` draws it, `operations` counts what of it is useful,
`worker` runs one implementation in a process of its own, `run` lets them take turns and compares.
"""
