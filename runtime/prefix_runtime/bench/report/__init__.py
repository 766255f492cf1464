"""The report of a benchmark for people: tables, charts, an HTML page."""
