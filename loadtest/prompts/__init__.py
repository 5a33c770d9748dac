"""Request bodies with prompts of exact token lengths, which share prefixes as the workload says."""
