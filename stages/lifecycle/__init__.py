"""What every stage is: its life from plan to manifest, parts that share it, what it gives back, branches of a run."""
