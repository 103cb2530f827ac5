"""features: examples and labels of a set from a text file."""
