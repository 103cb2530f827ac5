"""Entry points: which graph is made, circuit-tracer with qk=True, graphs in memory."""
