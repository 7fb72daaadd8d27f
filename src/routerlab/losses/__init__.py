"""A layer's RouterOutput to a scalar."""
