"""How chunks of weights are made smaller without loss: by entropy codes, of the exponents above all."""
