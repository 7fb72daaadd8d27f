"""What a run leaves for people: one HTML page made from the files of a run directory."""
