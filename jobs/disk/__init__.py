"""What jobs leave on disk and read again: rows, provenance, tables' columns. Imports no other jobs."""
