"""Faults of simulations: of the network, of clocks and of disks. All are seeded; the caller switches them."""
