"""Every destination is read back with the reader its users have; none of them can hurt a run."""

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import disk

import loggers
from harness.errors import UsageError
from harness.metrics import GREEDY, read_metrics
from loggers import Background, Console, File, Logger, Memory, check_keys, event_steps, make_logger


@dataclass
class Config:
    log: tuple[str, ...] = ("file",)
    total_steps: int = 1000
    num_seeds: int = 3
    env: str = "gymnax::CartPole-v1"
    wandb_mode: str = "offline"
    neptune_mode: str = "offline"


METRICS = {"charts/episodic_return": np.array([20.0, np.nan, 40.0]), "charts/SPS": 1234.5}


def log_twice(names, run_dir):
    about = {"script": "ppo", "id": "1a2b3c4d", "git": {"commit": "abc"}, "config": {}}
    about |= {"command": ["a|b", "\udcc3"], "sources": {"ppo.py": "5a"}}
    (run_dir / "config.json").write_text(json.dumps(about))
    with make_logger(Config(names), run_dir) as logger:
        logger.log(METRICS, step=500)
        logger.log({GREEDY: np.array([1.0, 2.0, 3.0])}, step=1000)


# --- File ----------------------------------------------------------------------------------------


def test_file_is_strict_json_lines(tmp_path):
    log_twice(("file",), tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [500, 1000]
    assert lines[0]["charts/episodic_return"] == [20.0, None, 40.0]
    assert lines[0]["charts/SPS"] == 1234.5
    assert lines[0]["system/memory_mb"] > 10
    assert 0 <= lines[0]["time"] <= lines[1]["time"]


def test_file_is_complete_before_it_is_closed(tmp_path):
    logger = make_logger(Config(), tmp_path)
    logger.log(METRICS, step=500)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 500


def test_time_continues_in_a_resumed_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 500, "time": 77.0}\n')
    log_twice(("file",), tmp_path)
    assert [int(record["time"]) for record in read_metrics(tmp_path / "metrics.jsonl")] == [77] * 3


def test_a_full_disk_delays_the_record_and_loses_nothing(tmp_path, capsys):
    logger = make_logger(Config(), tmp_path)
    (file,) = logger.backends
    real, file.file = file.file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (1, 2):
        logger.log(METRICS, step)
    warning = "warning: metrics.jsonl: No space left on device; it is retried at every report\n"
    assert capsys.readouterr().err == warning
    file.file = real
    logger.log(METRICS, 3)
    logger.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_what_is_broken_in_a_record_is_named_once_and_the_end_is_repaired(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "time": 5.0, "x/y": [1, null]}\n'
    broken = [
        b"\n",
        b"\0\0\n",
        b"\xff\xfe\n",
        b'{"step": 2}\n',
        b'{"step": 3, "time": 1, "a/b": 1"}\n',
    ]
    path.write_bytes(good + b"".join(broken) + good + good[:-20])
    for _ in range(3):
        assert [record["bytes"] for record in read_metrics(path)] == [
            len(good),
            len(b"".join(broken) + good),
        ]
    assert read_metrics(path, len(good) + 1)[0]["step"] == 1  # from the middle of a broken line
    line_2 = f"warning: '{path}': line 2 is broken and left out, and 4 more\n"
    assert capsys.readouterr().err == line_2
    log_steps(("file",), tmp_path, (9,))
    assert [record["step"] for record in read_metrics(path)] == [1, 1, 9]
    assert read_metrics(path)[-1]["time"] >= 5
    ended = f"warning: '{path}': the last line was not finished and is left out\n"
    assert capsys.readouterr().err == ended


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "time": 5.0}')
    log_steps(("file",), tmp_path, (9,))
    assert [record["step"] for record in read_metrics(path)] == [1, 9]
    assert not capsys.readouterr().err


def test_a_record_that_was_deleted_begins_again(tmp_path, capsys):
    file = File(tmp_path)
    for step in (1, 2, 3):
        file.log({}, step)
        if step == 1:
            file.path.unlink()
    file.close()
    assert [record["step"] for record in read_metrics(file.path)] == [2, 3]
    assert (
        capsys.readouterr().err == "warning: metrics.jsonl was deleted; it begins again at step 2\n"
    )


# --- The others' own readers ---------------------------------------------------------------------


def tensorboard_scalars(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = events.Tags()["scalars"]
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard_reads_the_events(tmp_path):
    log_twice(("tensorboard",), tmp_path)
    events, values = tensorboard_scalars(tmp_path)
    assert values["charts/episodic_return"] == [(500, 30.0)]
    assert values["charts/episodic_return/seed_2"] == [(500, 40.0)]
    assert values[GREEDY] == values[f"{GREEDY}/iqm"] == [(1000, 2.0)]
    assert "charts/episodic_return/seed_1" not in values  # nan is absent
    tables = {}
    for name in ("config", "about", "sources"):
        (event,) = events.Tensors(f"{name}/text_summary")
        tables[name] = event.tensor_proto.string_val[0].decode()
    assert "|env|gymnax::CartPole-v1|" in tables["config"] and "sources" not in tables["config"]
    assert "|id|1a2b3c4d|" in tables["about"] and "a\\|b" in tables["about"]
    assert "|ppo.py|5a|" in tables["sources"] and "5a" not in tables["about"]


def test_tensorboard_has_no_gaps_or_doubles_after_a_resume(tmp_path):
    record = tmp_path / "metrics.jsonl"
    # A killed run: its events were never flushed.
    with make_logger(Config(("file",)), tmp_path) as logger:
        for step in (100, 200, 300):
            logger.log({"losses/x": np.array([step / 100, np.nan])}, step)
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"what was")
    until_checkpoint = record.read_text().splitlines(keepends=True)[:2]
    record.write_text("".join(until_checkpoint))
    with make_logger(Config(("tensorboard", "file")), tmp_path, step=200) as logger:
        for step in (300, 400):
            logger.log({"losses/x": np.array([step / 10, np.nan])}, step)
    assert len(list(tmp_path.glob("events*"))) == 1
    _, values = tensorboard_scalars(tmp_path)
    assert values["losses/x"] == [(100, 1.0), (200, 2.0), (300, 30.0), (400, 40.0)]


def log_steps(names, run_dir, steps, step=None):
    """A run that continues from the checkpoint of `step` and reports 10 times the step."""
    with make_logger(Config(names), run_dir, step=step) as logger:
        for reported in steps:
            logger.log({"losses/x": np.array([reported * 10.0])}, reported)


@pytest.mark.parametrize(
    "names",
    [
        (("tensorboard",), ("file", "tensorboard"), ("file", "tensorboard")),
        (("file", "tensorboard"), ("tensorboard",), ("file", "tensorboard")),
        (("file", "tensorboard"), ("file",), ("file", "tensorboard")),
        (("file", "tensorboard"), ("tensorboard", "file"), ("file", "tensorboard")),
    ],
)
def test_tensorboard_is_rewritten_only_from_a_record_that_has_all(names, tmp_path):
    """The record begins late, or lacks the middle, or has what the events lack; or they agree.

    Every resume goes back to a checkpoint: the last report is made again.
    """
    record = tmp_path / "metrics.jsonl"
    log_steps(names[0], tmp_path, (100, 200, 250))
    for files, steps, step in ((names[1], (250, 300, 400), 200), (names[2], (350, 500), 300)):
        if record.exists():  # what `forget_after` does
            lines = record.read_text().splitlines(keepends=True)
            record.write_text("".join(x for x in lines if json.loads(x)["step"] <= step))
        log_steps(files, tmp_path, steps, step)
    _, values = tensorboard_scalars(tmp_path)
    assert values["losses/x"] == [(step, step * 10) for step in (100, 200, 250, 300, 350, 500)]


def test_a_run_that_begins_again_deletes_no_events(tmp_path):
    log_steps(("tensorboard",), tmp_path, (100, 200))
    (old,) = tmp_path.glob("events*")
    log_steps(("file", "tensorboard"), tmp_path, (50,))
    _, values = tensorboard_scalars(tmp_path)
    assert old.exists() and values["losses/x"] == [(50, 500)]


def test_broken_event_files_end_where_they_are_broken(tmp_path):
    log_steps(("tensorboard",), tmp_path, (100, 200))
    (path,) = tmp_path.glob("events*")
    whole = path.read_bytes()
    assert set(event_steps(path)) == {100, 200}
    for broken in (whole[:-5], whole[:-20], whole + b"\xff" * 50, b"", b"\0" * 100):
        path.write_bytes(broken)
        assert set(event_steps(path)) <= {100, 200}


def test_an_id_from_a_config_file_names_no_other_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"id": "../../x y"}')
    seen = {}

    class Seen:
        def __init__(self, run_dir, config, about):
            seen.update(about)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(loggers, "Dashboard", Seen)
        patches.setattr(loggers.sys.stdout, "isatty", lambda: True, raising=False)
        make_logger(Config(("dashboard",)), tmp_path)
    assert seen["id"] == "-x-y"


def test_tensorboard_gives_up_quietly_when_the_disk_is_full(tmp_path, capfd):
    with disk(tmp_path, "size=2m"):
        logger = make_logger(Config(("tensorboard", "file")), tmp_path)
        logger.log(METRICS, 1)
        (tmp_path / "filler").write_bytes(bytes(shutil.disk_usage(tmp_path).free - 2**16))
        for step in (2, 3):
            logger.log(METRICS, step)
            time.sleep(0.2)
        logger.close()
        errors = capfd.readouterr().err
        assert "TensorBoard stopped: OSError(28, 'No space left on device')" in errors
        assert errors.count("\n") == 1
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def wandb_inspect(*args):
    """What wandb's own tool reads in an offline run, once wandb's process has written the end."""
    wandb = Path(sys.executable).with_name("wandb")
    command = [wandb, "leet", "inspect", "--json", *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wandb_offline(tmp_path):
    log_twice(("wandb",), tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-1a2b3c4d")
    text = wandb_inspect("--follow", "--idle-timeout", "30s", folder)
    records = [json.loads(line) for line in text.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["_step"] for row in rows] == [500, 1000]
    assert rows[0]["charts/episodic_return"] == 30.0
    assert rows[0]["charts/episodic_return/seed_2"] == 40.0
    assert "charts/episodic_return/seed_1" not in rows[0]
    assert rows[1][f"{GREEDY}/iqm_low"] >= 1.0
    run = json.loads(wandb_inspect("--summary", folder))
    assert run["run_id"] == "1a2b3c4d" and run["state"] == "finished"
    assert run["config"]["env"] == "gymnax::CartPole-v1"
    assert run["config"]["about"]["git"]["commit"] == "abc"


def film_in(run_dir):
    """A video of an evaluation after 1000 steps, of two frames; other backends show none."""
    from PIL import Image

    path = run_dir / "videos" / "1000.gif"
    path.parent.mkdir()
    first, second = (Image.new("RGB", (6, 4), (level, 0, 0)) for level in (0, 255))
    first.save(path, save_all=True, append_images=[second])
    with make_logger(Config(("console", "file", "tensorboard", "wandb")), run_dir) as logger:
        logger.log({GREEDY: np.array([1.0, 2.0, 3.0])}, step=1000)
        logger.video(path, 1000)
        assert len(logger.backends) == 4
    return path.read_bytes()


def test_videos(tmp_path, capsys):
    content = film_in(tmp_path)
    assert not capsys.readouterr().err

    def check_tensorboard():
        events, _ = tensorboard_scalars(tmp_path)
        (image,) = events.Images("eval/video")
        assert (image.step, image.width, image.height) == (1000, 6, 4)
        assert image.encoded_image_string == content

    check_tensorboard()
    (copy,) = tmp_path.glob("wandb/offline-run-*/files/media/videos/eval/*.gif")
    assert copy.read_bytes() == content
    (tmp_path / "videos" / "2000.gif").write_bytes(b"of a step that will come again")
    (tmp_path / "videos" / "500.gif").touch()  # of a machine that lost its power
    (tmp_path / "videos" / "600.gif").symlink_to("nowhere")
    make_logger(Config(("tensorboard",)), tmp_path, step=1000).close()  # a resumed run
    check_tensorboard()
    assert "500.gif' is damaged, TensorBoard does without it" in capsys.readouterr().err


def test_neptune_offline(tmp_path):
    log_twice(("neptune",), tmp_path)
    from neptune.core.components.queue.disk_queue import DiskQueue

    (folder,) = (tmp_path / ".neptune" / "offline").glob("run__*")
    queue = DiskQueue(folder, to_dict=dict, from_dict=dict, lock=threading.RLock())
    logged, assigned = {}, {}
    while element := queue.get():
        operation = element.obj
        name = "/".join(operation["path"])
        if operation["type"] == "LogFloats":
            logged[name] = [(entry["step"], entry["value"]) for entry in operation["values"]]
        elif operation["type"].startswith("Assign"):
            assigned[name] = operation["value"]
    assert logged["charts/episodic_return/mean"] == [(500, 30.0)]
    assert logged["charts/episodic_return/seed_2"] == [(500, 40.0)]
    assert logged[f"{GREEDY}/iqm"] == [(1000, 2.0)]
    assert assigned["config/env"] == "gymnax::CartPole-v1"
    assert assigned["about/git/commit"] == "abc"


def console(capsys, reports, num_seeds=1, final_step=500_000):
    """The lines of a console for reports {step: metrics}, 10 seconds after one another."""
    backend = Console(SimpleNamespace(num_seeds=num_seeds), final_step)
    for i, (step, metrics) in enumerate(reports.items()):
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(time, "perf_counter", lambda now=10.0 * i: now)
            backend.log({name: np.asarray(value) for name, value in metrics.items()}, step)
    return capsys.readouterr().out.splitlines()


def test_console_prints_a_line_per_report_and_evaluation(capsys):
    reports = {
        0: {"charts/compile_seconds": 12.34},
        100: {"charts/SPS": 1234.5, "charts/episodic_return": [20.0, np.nan, 40.0]},
        200: {"charts/SPS": 1234.5, "charts/episodic_return": [np.nan] * 3},
        1000: {"eval/greedy_return": [1.0, 2.0, 3.0], "eval/sampled_return": [2.5, 2.5, np.nan]},
    }
    assert console(capsys, reports, num_seeds=3, final_step=1000) == [
        "compiled in 12.3 s",
        "   step          left       SPS             return length",
        "    100  10%  0:01:30     1,234      30.00 ± 10.00       ",
        "    200  20%  0:01:20     1,234                          ",
        "  1,000 100% eval: greedy 2.00 ± 0.82, sampled 2.50 ± 0.00",
    ]


@pytest.mark.parametrize("num_seeds", [1, 5])
@pytest.mark.parametrize("final_step", [1000, 500_000, 4_000_000_000])
@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        (("value_loss", "entropy", "approx_kl", "policy_loss"), "value loss"),
        (("td_loss", "q_values", "epsilon"), "epsilon"),
        (("td_loss", "q_values", "actor_loss", "alpha", "entropy"), "alpha"),
    ],
)
@pytest.mark.parametrize("value", [1.0, -12345.678, 1.234e9, -1e30])
def test_console_has_room_in_80_columns(losses, shown, final_step, num_seeds, value, capsys):
    values = np.linspace(value, value / 2, num_seeds)
    names = ["charts/episodic_return", "charts/episodic_length", *(f"losses/{x}" for x in losses)]
    names = [name.replace("losses/epsilon", "charts/epsilon") for name in names]
    report = dict.fromkeys(names, values) | {"charts/SPS": 98765432.1}
    evaluation = dict.fromkeys(("eval/greedy_return", "eval/sampled_return"), values)
    last = final_step - 1
    reports = {0: {}, last // 3: report, last // 2: report, last: evaluation}
    lines = console(capsys, reports, num_seeds, final_step)
    heading, first, *_ = lines
    assert max(map(len, lines)) <= 80 and len(first) == len(heading)
    headings = heading.replace(f" {shown}", f" {shown.replace(' ', '_')}").split()
    assert headings[:5] == ["step", "left", "SPS", "return", "length"]
    assert shown.replace(" ", "_") in headings
    # Columns do not touch: a number below every heading, the percentage, and the spread.
    for two_words in ("value loss", "td loss", "approx kl", "q value"):
        heading = heading.replace(two_words, "x")
    assert len(first.split()) == len(heading.split()) + 1 + 2 * (num_seeds > 1)
    assert ("±" in lines[-1]) == (num_seeds > 1)


def test_console_estimates_the_time_left_from_where_it_began(capsys):
    resumed = {300: {}, 400: {"charts/SPS": 1.0}, 800: {"charts/SPS": 1.0}}
    _, first, second = console(capsys, resumed, final_step=800)
    assert first.split()[:3] == ["400", "50%", "0:00:40"]  # 100 steps took 10 s
    assert second.split()[:3] == ["800", "100%", "0:00:00"]


def test_console_of_a_run_of_no_steps(capsys):
    (_, line) = console(capsys, {0: {"charts/SPS": 0.0}}, final_step=0)
    assert line.split() == ["0", "0%", "0"]


# --- Faults --------------------------------------------------------------------------------------


class Broken:
    def log(self, metrics, step):
        raise OSError("quota exceeded")

    def close(self):
        raise OSError("quota exceeded")


@pytest.mark.parametrize("wrap", [lambda backend: backend, Background])
def test_a_failing_backend_is_disabled_and_the_rest_continue(wrap, tmp_path, capsys):
    logger = make_logger(Config(), tmp_path)
    logger.backends.insert(0, wrap(Broken()))
    for step in (1, 2, 3):
        logger.log(METRICS, step)
        time.sleep(0.1)
    logger.close()
    warning = "Broken stopped: OSError('quota exceeded'); training continues without it\n"
    assert capsys.readouterr().err.count(warning) == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_a_hanging_backend_is_disabled_and_the_rest_continue(tmp_path, capsys):
    class Hanging:
        def log(self, metrics, step):
            time.sleep(3600)

        close = log

    logger = make_logger(Config(), tmp_path)
    logger.backends += [Background(Hanging(), capacity=5), Background(Hanging(), patience=0.2)]
    began = time.perf_counter()
    for step in range(10):
        logger.log(METRICS, step)
    logger.close()
    assert time.perf_counter() - began < 5
    errors = capsys.readouterr().err
    assert "Hanging stopped: TimeoutError('5 reports are waiting: it is too slow')" in errors
    assert "Hanging stopped: TimeoutError('it did not finish within 0 s')" in errors
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 10


def test_background_loses_nothing_and_keeps_the_order():
    seen = []

    def log(metrics, step):
        seen.append(step)

    backend = Background(SimpleNamespace(log=log, close=lambda: seen.append("end")))
    for step in range(500):
        backend.log({}, step)
    backend.close()
    assert seen == [*range(500), "end"]


def test_memory_has_the_series_of_a_notebook():
    memory = Memory()
    with Logger([memory]) as logger:
        logger.log(METRICS, step=500)
        logger.log({"eval/greedy_return": np.ones(3)}, step=600)
        logger.log(METRICS, step=1000)
    steps, values = memory.series("charts/SPS")
    np.testing.assert_array_equal(steps, [500, 1000])
    np.testing.assert_array_equal(values, [1234.5, 1234.5])
    assert memory.series("charts/episodic_return")[1].shape == (2, 3)
    assert [record["step"] for record in memory.records] == [500, 600, 1000]
    assert memory.series("nothing")[0].size == 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tensorboard", "needs tensorboardX, which is not installed: pip install tensorboardX"),
        ("wandb", "needs wandb, which is not installed: pip install wandb"),
        ("neptune", "needs neptune, which is not installed: pip install 'neptune<2'"),
        ("dashboard", "needs rich, which is not installed: pip install rich"),
    ],
)
def test_a_library_that_is_missing_is_named_before_a_run_begins(name, sentence, monkeypatch):
    module, _ = loggers.LIBRARIES[name]
    for part in (module, module.partition(".")[0]):
        monkeypatch.delitem(sys.modules, part, raising=False)

    class Missing:
        @staticmethod
        def find_spec(wanted, path=None, target=None):
            if wanted == module.partition(".")[0]:
                raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)

    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(UsageError, match=f"logger {name} {sentence}"):
        check_keys(Config((name,), wandb_mode="online"))


def test_no_backend_is_a_logger_too():
    with Logger() as logger:
        logger.log(METRICS, step=1)
