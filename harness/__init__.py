"""What a run needs besides its algorithm: errors, run directories, checkpoints, options, viewing."""
