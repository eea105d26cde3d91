"""Configuration: typed schema, YAML loader, checks."""
