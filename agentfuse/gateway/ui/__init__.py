"""The page: executions, files and memories for people, rendered here; the browser needs next to no script."""
