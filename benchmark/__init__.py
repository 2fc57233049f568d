"""How it is judged: running, scoring, aggregating and tabulating."""
