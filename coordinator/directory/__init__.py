"""Which workers are believed to hold which blocks, and how that is kept in step with them."""
