"""Adapters from environment libraries to one interface; README.md describes them.

Use them through `envs.py`: `from envs import make`. There is one file per namespace; the other
files hold what the namespaces share. Imports run one way:

    task, library < environment, wrappers < episodes, physics < gymnax, brax, ... < registry < cli
"""
