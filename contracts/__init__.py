"""Floor 0: what crosses a boundary between packages or processes. Types and limits, no behaviour.

Import the submodules (`from contracts.requests import GenerateRequest`); this file exports nothing.
"""
