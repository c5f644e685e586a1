"""What a run leaves to read: metrics.json and tables."""
