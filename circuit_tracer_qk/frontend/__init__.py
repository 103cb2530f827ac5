"""circuit-tracer's page with the QK panel, served."""
