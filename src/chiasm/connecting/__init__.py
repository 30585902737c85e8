"""How two models become one: `connect`, and a file for each place where they can meet."""
