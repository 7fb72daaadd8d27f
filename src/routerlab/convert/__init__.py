"""Models of transformers to decoders of ours and back, each conversion with a certificate."""
