"""Export networks to files, and measure the files."""
