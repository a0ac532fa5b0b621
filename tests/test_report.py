"""The report of the studies: its numbers, documents and figures, and the page in a browser."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import report
import results

from harness.errors import UsageError
from harness.metrics import iqm

ABOUT = {
    "commit": "c0ef676c7615d544a54b2eb75b9513593aced03b",
    "dirty": False,
    "date": "2026-11-29",
    "machine": {"device": "cpu", "cores": 2},
    "versions": {"python": "3.12.3", "jax": "0.11.2"},
}
CHAIN = "memorychain-10"
CARTPOLE = "cartpole-masked"
LEARNED = {  # (task, script, memory): what its seeds reach
    (CHAIN, "rppo", "gru"): [1.0, 0.9, 0.95],
    (CHAIN, "rppo", "lstm"): [0.8, 0.6, None],
    (CHAIN, "rppo", "none"): [0.0, 0.1, -0.1],
    (CARTPOLE, "rppo", "gru"): [500.0, 450.0, 400.0],
    (CARTPOLE, "rppo", "lstm"): [300.0, 350.0, 500.0],
    (CHAIN, "rpqn", "gru"): [1.0, 1.0, 1.0],
    ("pendulum-masked", "rppo_continuous", "gru"): [-200.0, -300.0, -150.0],
    ("pendulum-masked", "rppo_continuous", "lstm"): [-400.0, -300.0, -350.0],
}


def command(task, script, memory):
    return f"python algorithms/{script}.py --env {task} --cell {memory}"


def write(study, task, script, memory, returns):
    known = {"study": study, "task": task, "script": script, "memory": memory}
    finals = np.array(returns, float)
    low, _ = report.bounds(task)
    curves = [low + (np.nan_to_num(x, nan=low) - low) * np.array([0.5, 0.8, 1]) for x in finals]
    values = known | {
        "steps": 300,
        "num_seeds": len(returns),
        "median": np.median(finals),
        "worst": finals.min(),
        "returns": returns,
        "mmer": finals - 0.5,
        "curve": {"steps": [100, 200, 300], "returns": curves},
        "num_params": 1234,
        "learning_rate": 3e-4,
    }
    cost = known | {"seconds": 70.0, "steps_per_second": 15, "compile_seconds": 10.0}
    name = f"{study}/{task}/{script}-{memory}"
    results.record(f"study/{name}", values, command(task, script, memory), **ABOUT)
    results.record(f"study-cost/{name}", cost, command(task, script, memory), **ABOUT)


@pytest.fixture
def studied(tmp_path, monkeypatch):
    """The results of one study in a folder of their own; its path."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "RESAMPLES", 200)
    monkeypatch.setattr(report, "planned", lambda study: {})
    shutil.copytree(results.ROOT / "benchmark" / "results" / "recall", tmp_path / "results/recall")
    for key, returns in LEARNED.items():
        write("tiny", *key, returns)
    return tmp_path


@pytest.fixture
def rliable():
    """The library; tests that need it skip where it is missing or cannot work."""
    try:
        return report.rliable()
    except UsageError as error:
        pytest.skip(str(error))


def comparison(algorithm="rppo"):
    return next(x for x in report.comparisons(report.read("tiny")) if x.algorithm == algorithm)


# --- Numbers -------------------------------------------------------------------------------------


def test_scores_are_on_the_scale_of_the_bounds_and_diverged_seeds_have_the_lowest():
    assert report.score("popgym-any", [-1, 0, 1]).tolist() == [0, 0.5, 1]
    assert report.score("pendulum-masked", -875.0) == 0.5
    with pytest.raises(results.NoResult, match="add it to BOUNDS"):
        report.bounds("chess")


def test_every_task_of_memory_has_bounds():
    tasks = [task for task in report.learning.TASKS if task.startswith(("memory", "popgym"))]
    assert len(tasks) > 5
    assert all(report.bounds(task) for task in [*tasks, CARTPOLE, "pendulum-masked"])


def test_a_diverged_seed_counts_as_the_lowest_return_and_is_named(studied):
    setting = comparison().settings[CHAIN, "lstm"]
    assert setting.returns.tolist() == [0.8, 0.6, -1]
    assert setting.diverged == 1
    assert setting.mmer == pytest.approx(0.2)  # of the two that have one


def test_wall_clock_begins_with_compilation(studied):
    setting = comparison().settings[CHAIN, "gru"]
    assert setting.seconds([0, 150, 300]).tolist() == [10, 40, 70]


def test_scripts_for_continuous_actions_count_as_their_twins(studied):
    found = {x.algorithm: x.tasks for x in report.comparisons(report.read("tiny"))}
    assert found == {"rpqn": [CHAIN], "rppo": [CARTPOLE, "pendulum-masked", CHAIN]}


def test_aggregates_are_over_the_tasks_that_hold_most_results(studied):
    own = comparison()
    assert own.common_tasks == [CARTPOLE, "pendulum-masked", CHAIN]
    assert own.memories == ["gru", "lstm", "none"]
    assert own.compared == ["gru", "lstm"]  # none lacks two tasks


def test_aggregates_equal_those_by_hand_and_lie_in_their_intervals(studied, rliable):
    own = comparison()
    found = report.statistics(own)
    scores = np.concatenate([own.settings[task, "gru"].scores for task in own.common_tasks])
    by_hand = np.sort(scores)[2:-2].mean()  # nine, a quarter of which is two
    for memory in ("gru", "lstm"):
        for name, (point, low, high) in found[memory].items():
            assert (low <= point + 1e-9).all() and (point <= high + 1e-9).all(), name
    assert found["gru"]["iqm"][0] == pytest.approx(by_hand)
    assert found["gru"]["better"][0] == 0.5
    assert found["gru"]["profile"][0][0] == 1  # all are above 0
    assert found["gru"]["efficiency"][0][-1] == pytest.approx(by_hand)


def test_statistics_are_those_of_rliable(rliable, rng):
    from rliable import metrics

    x, y = rng.integers(0, 5, (2, 6, 4)) / 4  # with equal ones
    assert report.iqm_of_all(x) == pytest.approx(metrics.aggregate_iqm(x))
    assert report.iqm_of_all(x)[0] == iqm(x.ravel())
    ours = report.probability_of_improvement(x, y[:5])
    assert ours == pytest.approx(metrics.probability_of_improvement(x, y[:5]))
    shares = rliable.score_distributions(x, report.THRESHOLDS)
    assert report.profile(x) == pytest.approx(shares)


def test_intervals_do_not_depend_on_what_was_drawn_before(rliable, rng):
    scores = rng.random((4, 3))
    first = report.estimate(scores, report.iqm_of_all)
    np.random.random(5)
    assert np.array_equal(first, report.estimate(scores, report.iqm_of_all))


def test_too_new_a_pandas_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(report.importlib.metadata, "version", lambda name: "3.1.1")
    with pytest.raises(UsageError, match="fails with pandas 3.1.1: pip install 'pandas<3'"):
        report.rliable()


def test_without_rliable_one_sentence_says_what_to_install(studied, monkeypatch, capsys):
    def version(name):
        raise report.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(report.importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "rliable", None)
    monkeypatch.setitem(sys.modules, "rliable.library", None)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    with pytest.raises(SystemExit) as error:
        report.main()
    assert error.value.code == 2
    assert "report.py needs rliable, which is not installed" in capsys.readouterr().err


# --- Documents -----------------------------------------------------------------------------------


def cells_of(text, heading, memory):
    """The cells of a memory's row under a heading."""
    section = text.split(f"{heading}\n")[1]
    row = next(line for line in section.splitlines() if line.startswith(f"| `{memory}`"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_documents_figures_and_page_are_written_and_redrawing_gives_the_same_bytes(
    studied, rliable, monkeypatch
):
    pytest.importorskip("plotly")
    page = studied / "page" / "index.html"
    assert report.update([], False, page) == ["benchmark/studies/tiny.md"]
    names = {f"tiny-{a}-{name}.png" for a in ("rppo", "rpqn") for name in report.FIGURES}
    first = {path: path.read_bytes() for path in [*(studied / "studies").iterdir(), page]}
    assert {path.name for path in first} == names | {"tiny.md", "index.html"}
    assert report.update([], True, page) == []
    assert report.update(["tiny"], False, page) == []
    assert {path: path.read_bytes() for path in first} == first
    write("tiny", CHAIN, "rppo", "gru", [1.0, 1.0, 1.0])
    assert report.update([], True, page) == ["benchmark/studies/tiny.md"]


def test_tables_show_the_numbers_of_the_files_and_link_them(studied, rliable):
    found = [(x, report.statistics(x)) for x in report.comparisons(report.read("tiny"))]
    text = report.document("tiny", found, studied / "studies")
    file = f"(../results/study/tiny/{CHAIN}/rppo-gru.json)"
    cells = cells_of(text, "### MemoryChain, length 10 (`rppo`)", "gru")
    assert cells[:3] == ["`gru`", "0k", "3"]
    assert cells[3].startswith("[0.95 (0.9 to 1)](") and cells[3].endswith(file)
    assert cells[4:6] == [f"[0.9]{file}", f"[0.45]{file}"]
    assert cells[6] == f"[15](../results/study-cost/tiny/{CHAIN}/rppo-gru.json)"
    assert "1 diverged" in cells_of(text, "### MemoryChain, length 10 (`rppo`)", "lstm")[2]
    together = cells_of(text, "## `rppo`: all tasks together", "gru")
    points = {x.algorithm: own["gru"]["iqm"][0][0] for x, own in found}
    assert together[1].startswith(f"{report.number(points['rppo'])} (")


def test_what_is_missing_is_shown_as_missing(studied, rliable, monkeypatch):
    plan = {(CHAIN, "rppo", "s5"): "python algorithms/rppo.py --cell s5"}
    monkeypatch.setattr(report, "planned", lambda study: plan)
    found = [(x, report.statistics(x)) for x in report.comparisons(report.read("tiny"))]
    text = report.document("tiny", found, studied / "studies")
    cells = cells_of(text, "### MemoryChain, length 10 (`rppo`)", "s5")
    assert cells == ["`s5`", *["missing"] * 7]
    heading = "## `rppo`: all tasks together"
    assert cells_of(text, heading, "s5") == ["`s5`", "missing: 3 of 3 tasks", "missing"]
    assert cells_of(text, heading, "none") == ["`none`", "missing: 2 of 3 tasks", "missing"]


def test_the_study_file_says_what_is_planned(monkeypatch):
    def of(memory):
        agent = types.SimpleNamespace(command=f"python algorithms/rppo.py --cell {memory}")
        known = {"task": CHAIN, "script": "rppo", "memory": memory, "reported": lambda: agent}
        return types.SimpleNamespace(**known)

    runner = types.ModuleType("study")
    runner.FILE = "study.toml"
    runner.read_studies = lambda path: {"tiny": [of("gru"), of("s5")]}
    monkeypatch.setitem(sys.modules, "study", runner)
    assert list(report.planned("tiny")) == [(CHAIN, "rppo", "gru"), (CHAIN, "rppo", "s5")]
    assert report.planned("other") == {}
    monkeypatch.setitem(sys.modules, "study", None)
    assert report.planned("tiny") == {}


def test_studies_without_results_are_refused_with_one_sentence(studied, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "huge"])
    with pytest.raises(SystemExit) as error:
        report.main()
    assert error.value.code == 1
    expected = "the study huge has no results: `python benchmark/study.py huge` writes them"
    assert expected in capsys.readouterr().err


def test_documents_of_the_repository_show_what_the_files_say(rliable):
    if not report.studies():
        pytest.skip("no study has results")
    assert report.update([], True, report.PAGE) == []


# --- The page ------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium; skips where it, its driver or selenium is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1300,1000"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(driver)
    browser = webdriver.Chrome(options, service)
    yield browser
    browser.quit()


def click(browser, selector):
    browser.execute_script(f"document.querySelector({json.dumps(selector)}).click()")


def count(browser, selector):
    return browser.execute_script(
        f"return document.querySelectorAll({json.dumps(selector)}).length"
    )


def text_of(browser, selector):
    script = f"return document.querySelector({json.dumps(selector)}).innerText"
    return browser.execute_script(script)


def test_the_page_works_in_a_browser(studied, rliable, monkeypatch, browser):
    pytest.importorskip("plotly")
    wait = pytest.importorskip("selenium.webdriver.support.wait")
    plan = {(CHAIN, "rppo", "s5"): "python algorithms/rppo.py --cell s5"}
    monkeypatch.setattr(report, "planned", lambda study: plan)
    write("other", CHAIN, "rppo", "gru", [0.5, 0.5, 0.5])
    path = studied / "index.html"
    report.update([], False, path)
    browser.get(path.as_uri())
    ready = "return document.body.dataset.ready == 'yes'"
    wait.WebDriverWait(browser, 30).until(lambda browser: browser.execute_script(ready))
    assert text_of(browser, "#study") == "other\ntiny"

    browser.execute_script(
        "const s = document.getElementById('study'); s.value = 'tiny';"
        "s.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    assert text_of(browser, "#status") == "8 settings shown, 1 missing."
    assert count(browser, "#curves .js-plotly-plot") == 3
    drawn = ("score-curves", "score-time", "aggregates", "length", "recall")
    for name in drawn:
        assert count(browser, f"#{name} .scatterlayer .point"), name
    plots = "[...document.querySelectorAll('.js-plotly-plot')]"
    assert browser.execute_script(f"return {plots}.every(x => x.getAttribute('aria-label'))")
    assert "missing" in text_of(browser, "#numbers")

    click(browser, "input[name=task][value=pendulum-masked]")
    assert count(browser, "#curves .js-plotly-plot") == 2
    click(browser, "input[name=memory][value=lstm]")
    assert "lstm" not in text_of(browser, "#numbers")
    click(browser, "input[name=algorithm][value=rpqn]")
    assert "rpqn" not in text_of(browser, "#numbers")
    click(browser, "input[name=x][value=seconds]")
    script = "return document.querySelector('#curves .js-plotly-plot').layout.xaxis.title.text"
    assert browser.execute_script(script) == "seconds"
    # What is drawn, in one plot: the GRU with its band.
    script = "return document.querySelector('#curves .js-plotly-plot').data.map(x => x.x.at(-1))"
    assert 70 in browser.execute_script(script)

    click(browser, "#numbers tbody .number")
    detail = text_of(browser, "#detail")
    for expected in (command(CHAIN, "rppo", "gru"), ABOUT["commit"], "\n1, 0.9, 0.95\n"):
        assert expected in detail
    click(browser, "#detail .copy")
    click(browser, "#detail form button")
    assert not browser.execute_script("return document.getElementById('detail').open")
    click(browser, "#aggregate-table .number")
    assert "python benchmark/report.py tiny" in text_of(browser, "#detail")
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
