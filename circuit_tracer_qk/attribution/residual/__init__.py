"""The residual graph: features of residual-stream dictionaries, one block an edge."""
