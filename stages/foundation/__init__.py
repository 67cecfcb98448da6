"""What everything stands on: settings, errors, seeds, nested tensors, files, background work."""
