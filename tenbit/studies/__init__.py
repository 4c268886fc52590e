"""Studies: measurements made with the parts of a run."""
