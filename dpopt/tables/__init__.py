"""Tables of results: which runs they consist of, their pages and figures."""
