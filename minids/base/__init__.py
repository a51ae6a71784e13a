"""Settings, command lines, files, tables, memory. Imports nothing of ours."""
