"""What KV is kept under which key: block keys, and what of a worker's blocks can be found by them."""
