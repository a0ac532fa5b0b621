"""The README's pictures of runs: the dashboard, learning curves, and two agents side by side.

    python benchmark/pictures.py

Trains what is missing under runs/learning, then draws into benchmark/.
"""

import subprocess
import sys

from learning import CARTPOLE, MASK, ROOT, is_complete, run_dir, train
from PIL import Image, ImageDraw, ImageSequence

BENCHMARK = ROOT / "benchmark"
TASK = f"{CARTPOLE} {MASK}"
RUNS = {"PPO, no memory": f"ppo.py {TASK}", "recurrent PPO, GRU": f"rppo.py {TASK} --cell gru"}


def film(command, path):
    script = str(ROOT / "algorithms" / command.split()[0])
    subprocess.run(
        [sys.executable, script, "--evaluate", str(run_dir(command)), "--video", str(path)]
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


def dashboard(command, path):
    from rich.console import Console

    from harness.dashboard import draw, load

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw(load(run_dir(command))))
    console.save_svg(str(path), title=f"python algorithms/{command} --log dashboard file")


def main():
    for command in RUNS.values():
        if not is_complete(command):
            train(command)
    films = {title: run_dir(command) / "agent.gif" for title, command in RUNS.items()}
    for title, command in RUNS.items():
        film(command, films[title])
    beside(films, BENCHMARK / "agents.gif")
    runs = [str(run_dir(command)) for command in RUNS.values()]
    curves = ["--plot", str(BENCHMARK / "curves.png")]
    subprocess.run([sys.executable, str(ROOT / "loggers.py"), *runs, *curves], check=True)
    dashboard(RUNS["recurrent PPO, GRU"], BENCHMARK / "dashboard.svg")


if __name__ == "__main__":
    main()
