"""All that touches circuit-tracer: its graphs, its command line, its entry points."""
