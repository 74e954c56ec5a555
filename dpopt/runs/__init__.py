"""A run on disk and on screen: identity, directory, result, privacy card, tracking, console."""
