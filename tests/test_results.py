"""The front page and benchmark/results: links work, snippets run, every file is named on its folder's page."""

import importlib
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark/results"
PAGES = [ROOT / "README.md", ROOT / "benchmark/weights/README.md", *sorted(RESULTS.rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_works(page):
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in target]
    for target in targets:
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("folder", sorted({path.parent for path in RESULTS.rglob("*")}), ids=lambda path: path.name)
def test_every_file_is_named_on_its_folders_page(folder):
    """By its whole name, or by one with a star in it that is written as code."""
    text = (folder / "README.md").read_text()
    named = re.findall(r"`([^`\s]+)`|\]\(([^)\s]+)\)", text)
    patterns = [pattern or link for pattern, link in named]
    for file in folder.iterdir():
        if file.is_file() and file.name != "README.md":
            assert any(fnmatch(file.name, pattern) for pattern in patterns), file.name
    assert not list(folder.glob("*.svg"))  # pictures are PNGs


def test_the_front_pages_table_is_that_of_the_results():
    pytest.importorskip("rliable")
    front_page = importlib.import_module("benchmark.front_page")
    table = front_page.table(front_page.read_curves(), front_page.read_published())
    assert table == (RESULTS / "learning_curves/front_page.md").read_text()
    for page in (ROOT / "README.md", RESULTS / "learning_curves/README.md"):
        assert table in page.read_text(), page
    (row,) = (line for line in table.splitlines() if line.startswith("| HalfCheetah-v4"))
    assert row.startswith("| HalfCheetah-v4 | 6,584 (2 seeds) | 8,673 (2 seeds) |")  # mfpo_policy_tau, smfp_policy_lr
    seeds = {1: {100_000: 1000.4}, 2: {100_000: 2001.0, 50_000: 7.0}, 3: {50_000: 1.0}}
    assert front_page.cell(seeds) == "1,501 (2 seeds)" and front_page.cell({3: seeds[3]}) == ""
    steps, values = front_page.average({1: {10: 1.0, 20: 2.0, 30: 3.0}, 2: {30: 7.0, 20: 6.0}})
    assert steps == [20, 30] and values.tolist() == [[2.0, 3.0], [6.0, 7.0]]


def test_the_front_pages_first_table_has_the_scripts_lines_and_the_results_returns():
    pattern = r"^\| `((\w+)_continuous.py)` .*? ([\d,]+)" + 2 * r" \| ([\d,]+(?: \(\d seeds\))?)" + r" \|$"
    found = re.findall(pattern, (ROOT / "README.md").read_text(), re.MULTILINE)
    table = (RESULTS / "learning_curves/front_page.md").read_text()
    heads, _, *rows = (line.split(" | ") for line in table.splitlines())
    assert len(found) == 3
    for file, method, lines, *returns in found:
        assert int(lines.replace(",", "")) == len((ROOT / file).read_text().splitlines()), file
        assert returns == [row[heads.index(method.upper())] for row in rows[:2]]  # HalfCheetah and Hopper


@pytest.mark.parametrize("script", ["sac_continuous", "smfp_continuous", "mfpo_continuous"])
def test_the_front_pages_snippets_play_an_episode_and_export_the_policy(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    args = module.Args(env_id="InvertedPendulum-v4")
    torch.save({"args": vars(args), "agent": module.Agent(4, 1, args, torch.device("cpu")).state_dict()}, "saved.pt")
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(
            snippet.replace("smfp_continuous", script).replace("benchmark/weights/smfp_halfcheetah.pt", "saved.pt"),
            names,
        )
    assert names["terminated"] and names["reward"] == 1  # the pole has fallen
    torch.manual_seed(0)
    expected = names["agent"].eval_actions(names["obs"][None])
    torch.manual_seed(0)
    torch.testing.assert_close(torch.export.load("policy.pt2").module()(names["obs"][None]), expected)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmark/weights").glob("*.pt")), ids=lambda path: path.name)
def test_trained_weights_are_small_and_fit_their_script(file):
    assert file.stat().st_size < 2e6
    script = importlib.import_module(file.name.split("_")[0] + "_continuous")
    saved, args = script.load_file(file, "the file")
    env = script.make_env(args.env_id)
    agent = script.Agent(env.observation_space.shape[0], env.action_space.shape[0], args, torch.device("cpu"))
    agent.load_state_dict(saved["agent"])
    (total,) = script.evaluate(agent.eval_actions, [env], 0, torch.device("cpu"), max_steps=200)
    assert total > 300  # it runs: random actions have less than 50 by then


def test_no_two_files_have_names_that_differ_in_case_alone():
    """On a Mac they would be one file."""
    names = [str(path).lower() for path in RESULTS.rglob("*")]
    assert len(set(names)) == len(names)
