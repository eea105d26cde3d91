"""The residual stream and its kinds."""
