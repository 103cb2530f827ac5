"""circuit-tracer's own graphs, explained: transcoders and cross-layer transcoders."""
