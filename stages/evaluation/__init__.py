"""What `probe` and `evaluate` share: the rows of a comparison, their metrics, intervals, and the verdict."""
