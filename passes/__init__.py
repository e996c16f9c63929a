"""The compiler's passes. Each one analyses or rewrites the graph, or records edits of the weights."""
