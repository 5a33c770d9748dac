"""One machine's store: which blocks stand in its host memory, which on its disk, and what moves between the two."""
