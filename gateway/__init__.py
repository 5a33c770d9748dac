"""Floor 5: the OpenAI-compatible front door: REST, tokenising, and ownership of each token stream.

Import the submodules. `gateway.core` has no HTTP in it (the simulation drives it on a virtual loop);
`gateway.server` has the settings, `create_app` and `serve`.
"""
