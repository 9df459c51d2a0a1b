"""Adapters, and a base model together with them, in the formats that others read. Importing this imports no torch."""
