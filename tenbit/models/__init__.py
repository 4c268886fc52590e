"""Language models: loading, log-probabilities in chunks, and the small model that comes with the package."""
