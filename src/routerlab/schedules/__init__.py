"""A setting as a function of depth or of progress."""
