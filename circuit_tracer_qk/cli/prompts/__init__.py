"""attribute --prompts: one model for many prompts."""
