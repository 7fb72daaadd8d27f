"""Gradients through discrete choices."""
