"""Questions to a dataset that exists: status, explain, verify, leftovers."""
