"""The passes: each rewrites the graph or records an edit of the weights."""
