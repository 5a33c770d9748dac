"""The disk tier of the store: blocks in checksummed segment files that outlast a restart of everything."""
