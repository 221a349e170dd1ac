"""Shows the published samples of a dataset to one person's browser, and keeps what the person chooses about them."""
