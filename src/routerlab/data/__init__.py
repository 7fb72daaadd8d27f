"""Text for language modelling: sources, tokenizers, cached corpora, batches, n-gram baselines."""
