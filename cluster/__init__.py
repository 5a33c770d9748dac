"""Floor 6: the composition root. The `tandem` command, the node agent and the processes they start."""
