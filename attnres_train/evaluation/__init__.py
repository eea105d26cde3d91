"""What a model that was trained is worth on text: losses by corpus and position, and the harness."""
