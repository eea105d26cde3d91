"""What runs did: a summary, a table, a plot, a page."""
