"""Text as bytes: corpora with a digest, and batches that depend on nothing but (corpus, seed, step)."""
