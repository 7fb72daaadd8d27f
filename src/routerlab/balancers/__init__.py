"""Biases on the choice of experts, learned from past load without a loss, one file an idea."""
