"""Parts of the sampler: slot state, penalties, the exchange between ranks, the exact nucleus, log-probabilities.

`evener.execute.live.sampler` puts them together. Suffixes: S sampled rows, V local vocabulary, R ranks,
F rows with top-k, top-p or min-p, M merged candidates of a row.
"""
