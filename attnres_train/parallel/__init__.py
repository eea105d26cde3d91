"""Process groups and collective operations on gradients."""
