"""Requests that move between workers while they are written: both sides' machines, and what carries them out."""
