"""`nmoe bench records`: the same budget for every variant of a config, with seeds, and what came of it as a table."""
