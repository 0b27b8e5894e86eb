"""Model cards and inspection pages."""
