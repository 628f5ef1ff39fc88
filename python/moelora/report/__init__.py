"""What is made of a demo's ``report.json``: the table in the terminal, and pictures."""
