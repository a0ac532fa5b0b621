"""One file per environment library, and what they share. `envs.py` is the door: `from envs import make`.

Imports run one way:

    task < environment, episodes, wrappers, physics < gymnax, brax, ... (one per namespace) < registry < cli
"""
