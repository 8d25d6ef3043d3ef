"""The science: one folder a paper, each with its mechanism, claims, arms and measures."""
