"""The event heap: the pure policies driven directly, for thousands of workers and days of traffic."""
