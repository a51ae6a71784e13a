"""Settings, command lines, files, tables. Imports nothing of ours."""
