"""A corpus from what package registries carry, for machines that reach no hub of data sets."""
