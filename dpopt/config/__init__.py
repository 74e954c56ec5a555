"""The configuration: its typed root, Hydra's overrides, and components as checked Python calls."""
