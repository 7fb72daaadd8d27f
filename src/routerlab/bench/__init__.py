"""How fast a layer is and what it keeps in memory, measured against peers in the same run."""
