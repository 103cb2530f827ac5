"""What decomposes the residual stream: reading every layout, the list of known sets, writing."""
