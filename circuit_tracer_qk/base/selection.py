"""The two rules by which a graph's nodes are chosen (attribution/README.md, "Which nodes")."""

CIRCUIT_TRACER, EXPLAINED = "circuit-tracer", "explained"
SELECTIONS = (CIRCUIT_TRACER, EXPLAINED)
