"""Which bits each layer gets: candidates, the integer program, and plans tried on texts."""
