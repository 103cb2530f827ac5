"""A transformer as exact linear maps, and one run of it, frozen."""
