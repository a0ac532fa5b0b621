"""Building blocks that several memories share: scans, chunks, window attention, convolutions.

Imports run one way: parts < masked_rnn < memories < the registry in `memory_cells/__init__.py`.
"""
