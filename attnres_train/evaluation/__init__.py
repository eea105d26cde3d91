"""What a trained model is worth on text: losses by corpus and position, and the harness."""
