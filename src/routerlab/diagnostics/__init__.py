"""A layer's RouterOutput to named numbers: additive sums first, values after the reduction."""
