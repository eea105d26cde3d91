"""What is done with a model that has been trained: opening it, text from it."""
