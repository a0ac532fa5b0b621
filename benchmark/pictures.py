"""The README's pictures of runs: the dashboard, learning curves, and two agents side by side.

    python benchmark/pictures.py

Trains what is missing under runs/learning, then draws into benchmark/.
"""

import subprocess
import sys

from learning import ROOT, find, is_complete, train
from PIL import Image, ImageDraw, ImageSequence

BENCHMARK = ROOT / "benchmark"
AGENTS = {
    "PPO, no memory": find("cartpole-masked/ppo"),
    "recurrent PPO, GRU": find("cartpole-masked/rppo-gru"),
}


def film(agent, path):
    script = str(ROOT / "algorithms" / agent.script)
    subprocess.run(
        [sys.executable, script, "--evaluate", str(agent.run_dir), "--video", str(path)]
        + ["--eval-policy", "greedy"],
        check=True,
    )


def beside(films, path):
    """The films of several agents in one; those that end early stand still on their last frame."""
    frames = {
        title: [f.convert("RGB") for f in ImageSequence.Iterator(Image.open(film))]
        for title, film in films.items()
    }
    width, height = next(iter(frames.values()))[0].size
    together = []
    for t in range(0, max(map(len, frames.values())), 2):
        image = Image.new("RGB", (width * len(frames), height + 20), "white")
        draw = ImageDraw.Draw(image)
        for i, (title, own) in enumerate(frames.items()):
            over = "" if t < len(own) else f": over after {len(own)} steps"
            draw.text((width * i + 8, 4), title + over, fill="black")
            image.paste(own[min(t, len(own) - 1)], (width * i, 20))
        together.append(image.quantize(16))
    together[0].save(
        path, save_all=True, append_images=together[1:], duration=80, loop=0, optimize=True
    )


def dashboard(agent, path):
    from rich.console import Console

    from harness.dashboard import draw, load

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw(load(agent.run_dir)))
    console.save_svg(str(path), title=f"{agent.command} --log dashboard file")


def main():
    for agent in AGENTS.values():
        if not is_complete(agent):
            train(agent)
    films = {title: agent.run_dir / "agent.gif" for title, agent in AGENTS.items()}
    for title, agent in AGENTS.items():
        film(agent, films[title])
    beside(films, BENCHMARK / "agents.gif")
    runs = [str(agent.run_dir) for agent in AGENTS.values()]
    curves = ["--plot", str(BENCHMARK / "curves.png")]
    subprocess.run([sys.executable, str(ROOT / "loggers.py"), *runs, *curves], check=True)
    dashboard(AGENTS["recurrent PPO, GRU"], BENCHMARK / "dashboard.svg")


if __name__ == "__main__":
    main()
