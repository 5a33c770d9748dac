"""Studies of cold starts over an event heap: production placement, estimates and keep-alive on modelled machines."""
