"""What every room stands on: errors, safe files, JSON text, threads, precision, the hub."""
