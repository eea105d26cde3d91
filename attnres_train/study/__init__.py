"""Studies: many runs that differ in what is asked, and what can be said of the difference."""
