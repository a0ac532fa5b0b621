"""Pieces that several memories share: scans, chunks, attention over a window, convolutions."""
