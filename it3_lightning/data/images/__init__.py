"""Images: their data modules, where they come from, and their shifts."""
