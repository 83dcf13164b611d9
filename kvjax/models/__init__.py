"""Real models: configs, one decoder, checkpoints, tokenizers, and where to fetch them.

`load.load` gives a `Model`; `decoder.decode_layers` runs it with any attention and cache;
`causal.forward` is exact attention without a cache; `config.known_configs` plans memory without
weights.
"""
