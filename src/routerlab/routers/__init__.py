"""Tokens to a RouterOutput, one file an idea."""
