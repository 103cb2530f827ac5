"""What every kind of graph shares: components, scores, QK tables."""
