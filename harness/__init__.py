"""What runs need: errors, metrics, run directories, checkpoints, options, a dashboard.

Imports run one way: errors, metrics < run_dir, checkpoints < options < dashboard.
"""
