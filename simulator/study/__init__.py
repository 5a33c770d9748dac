"""Capacity studies for people: what to simulate from a few flags, and what came of it as figures, plots and files."""
