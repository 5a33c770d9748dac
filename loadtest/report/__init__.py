"""From records to figures, and from figures to a table, JSON, CSV and one HTML page."""
