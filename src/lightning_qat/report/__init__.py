"""The results of runs and sweeps: metrics.json, tables and HTML pages."""
