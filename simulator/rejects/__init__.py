"""Were the refusals right? Reads decision logs, and replays what was decided over the event heap."""
