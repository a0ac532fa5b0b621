"""Virtual environments of other libraries, to measure beside ours with the same JAX.

    python benchmark/peers.py            # make all, under runs/peers
    python benchmark/peers.py memorax    # make one, and print its interpreter

What is complete is used again.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from results import ROOT, last_line, slug

PEERS = {  # name: what pip installs, besides the JAX that ours has
    "memorax": ("memorax==1.0.1", "gymnax<1"),
    "rejax": ("rejax==0.1.3", "gymnax<1", "six"),
    "sbx": ("sbx-rl==0.28.0",),
    "sb3": ("sb3-contrib==2.7.0",),
}


def requirements_of(peer: str) -> list[str]:
    jax = importlib.metadata.version("jax")
    return [f"jax=={jax}", f"jaxlib=={jax}", *PEERS[peer]]


def interpreter_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made first where it is missing or half made.

    Raises:
      SystemExit: it could not be installed, in one sentence.
    """
    requirements = requirements_of(peer)
    folder = (
        ROOT / "runs" / "peers" / slug(" ".join([peer, f"py{sys.version_info[1]}", *requirements]))
    )
    python = folder / "bin" / "python"
    is_complete = folder / "complete"
    if not is_complete.exists():
        print(f"installing {' '.join(requirements)}", file=sys.stderr)
        make = [sys.executable, "-m", "venv", "--clear", folder]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (make, [*install, *requirements]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = last_line(done.stdout + done.stderr)
                sys.exit(f"error: {peer} cannot be installed: {reason}")
        is_complete.touch()
    return python


def main():
    for peer in sys.argv[1:] or PEERS:
        if peer not in PEERS:
            sys.exit(f"error: unknown peer {peer!r}; known: {', '.join(PEERS)}")
        print(interpreter_of(peer))


if __name__ == "__main__":
    main()
