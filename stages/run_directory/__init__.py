"""The run directory: the project, its stages and their folders, states, sources, locks; reads records, builds no network."""
