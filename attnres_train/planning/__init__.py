"""What a configuration's pipeline sends, stores and costs, before any worker."""
