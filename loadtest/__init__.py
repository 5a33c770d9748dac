"""The load test: an open-loop client with an honest clock, for any OpenAI-compatible server.

It talks HTTP only, and imports neither torch nor anything of a server. Packages: `http` moves bytes and reads answers,
`prompts` makes request bodies, `report` tells what was measured.
"""
