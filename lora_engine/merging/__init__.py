"""Several adapters into one: exactly, or with the error stated."""
