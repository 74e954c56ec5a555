"""Per-sample gradients: their norms, and their sum under weights. Nothing here knows of privacy."""
