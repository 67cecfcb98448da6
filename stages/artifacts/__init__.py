"""Everything that touches the disk: projects, run directories, stages' folders, the delta store, checkpoints."""
