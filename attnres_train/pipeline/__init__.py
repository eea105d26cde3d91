"""Layout, transport plan, schedule and engine of the pipeline."""
