"""What several tests use: stand-ins, references, pages."""
