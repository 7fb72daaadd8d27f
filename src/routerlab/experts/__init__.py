"""What a token meets: networks with one slice of weights an expert."""
