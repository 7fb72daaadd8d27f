"""What a router promises, checked by running it."""
