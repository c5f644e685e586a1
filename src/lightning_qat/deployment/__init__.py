"""From a network to files that classify images, and what those are worth."""
