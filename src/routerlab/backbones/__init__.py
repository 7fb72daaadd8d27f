"""Models that return their routing: batch to BackboneOutput."""
