"""Weights at the speed of the hardware: a checkpoint format made for loading, its converter, and a tiered loader.

Public names are re-exported here; modules beside this one are the room's own.
"""
