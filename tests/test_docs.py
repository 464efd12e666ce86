"""The documentation is true: its programs run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from laws_ros.build import calibrate
from laws_ros.cli import main, parser
from laws_ros.core.card import Card
from laws_ros.core.library import Library
from laws_ros.runtime.files import share_path
from laws_ros.runtime.policy import Policy

ROOT = share_path("README.md").parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "reference"} & set(page.parts)]


def programs(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_the_penalty_in_a_training_loop_of_ones_own(capsys):
    pytest.importorskip("torch", reason="training needs PyTorch: make torch")
    (program,) = programs("docs/cacheable-training.md", "python")
    found: dict = {}
    exec(compile(program, "cacheable-training.md", "exec"), found)
    assert found["gap_cacheable"] < 0.3 * found["gap_plain"]
    assert found["error_cacheable"] < 0.05
    assert "gap" in capsys.readouterr().out


def test_a_policy_from_torch_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="exporting needs PyTorch: make torch")
    monkeypatch.chdir(tmp_path)
    export, _ = programs("docs/own-policy.md", "python")
    exec(compile(export, "own-policy.md", "exec"), {})
    (card,) = programs("docs/own-policy.md", "yaml")
    Path("policy.yaml").write_text(card)
    policy = Policy("policy.onnx")
    assert isinstance(policy.card, Card)
    assert [c.name for c in policy.card.actions] == ["slider.effort"]


EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """As from a shell, but in this process, which has imported what takes long."""
    path = ROOT / "docs/examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small policy of the cart-pole, which the example for torch makes."""
    pytest.importorskip("torch", reason="training needs PyTorch: make torch")
    pytest.importorskip("mujoco", reason="the cart-pole needs MuJoCo: pip install 'laws_ros[sim]'")
    out = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_example("own_torch_policy", monkeypatch, "--out", out)
    return out / "own.onnx"


@pytest.mark.parametrize("name", [p.stem for p in EXAMPLES])
def test_examples_run(name: str, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "own_torch_policy": (),
        "stable_baselines": ("dqn.laws",),
        "from_a_bag": ("run.mcap", "bag.laws"),
        "prove_and_report": ("proved.laws", "report.html", "robot.zip"),
        "calibrate": ("calibrated.laws",),
    }[name]
    if name == "own_torch_policy":
        assert Library.load(own.with_suffix(".laws")).policy_sha256 == Policy(own).sha256
        return
    if name == "stable_baselines":
        pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed: pip install it")
        run_example(name, monkeypatch, "--out", tmp_path)
    else:
        for constant, value in (("GRID", (0.02, 0.16)), ("REFINE", 1), ("ROUNDS", 1), ("SWITCH_S", (0.1,))):
            monkeypatch.setattr(calibrate, constant, value)
        run_example(name, monkeypatch, "--policy", own, "--out", tmp_path)
    assert set(made) <= {p.name for p in tmp_path.iterdir()}


SHORTER = {
    "build": "--steps 3000 --tolerance 5%",
    "verify": "--samples 1000",
    "eval": "--episodes 1",
    "record": "--episodes 1",
    "report": "--steps 300",
    "export-vnnlib": "--region",  # and its name
}
ELSEWHERE = {"up", "top", "demo", "adapt", "calibrate", "bench"}  # run by tests of their own


@pytest.mark.parametrize("page, language", [("docs/start.md", "sh"), ("README.md", "")])
def test_the_commands_of_the_first_pages_run(
    page: str, language: str, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, word for word, on a small policy in the place of theirs, and with fewer steps."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for end in ("onnx", "yaml", "laws"):
        for name in ("models/cartpole", "P"):
            Path(f"{name}.{end}").write_bytes(own.with_suffix(f".{end}").read_bytes())
    lines = [line for fence in programs(page, language) for line in fence.splitlines()]
    done = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] != ["laws"] or words[1] in ELSEWHERE or "../shared" in line:
            continue
        more = SHORTER.get(words[1], "").split()
        if words[1] == "export-vnnlib":
            more += Library.load("P.laws").ids[:1]
        assert main([*words[1:], *more]) == 0, line
        done += 1
    assert done >= 4


def test_every_example_is_on_the_page() -> None:
    text = (ROOT / "docs/examples.md").read_text()
    assert EXAMPLES and all(f"examples/{path.name}" in text for path in EXAMPLES)


def commands(page: Path) -> list[str]:
    """Every `laws ...` of a page, in fences and in backticks, continuation lines joined, comments left out."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for fence in re.findall(r"```(?:sh)?\n(.*?)```", text, re.S) for line in fence.splitlines()]
    lines += [line.replace("\n", " ") for line in re.findall(r"(?<!`)`(laws [^`]+)`", text)]
    return [line.partition("#")[0].strip() for line in lines if re.match(r"laws [a-z]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_that_is_named_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole command lines parse; those cut short (`laws build`, `laws verify --attack`) name what there is."""
    (choices,) = (a.choices for a in parser()._actions if isinstance(a.choices, dict))
    for line in commands(page):
        name, *rest = shlex.split(line)[1:]
        for one in name.split("|"):
            assert one in choices, line
        options = [word.partition("=")[0] for word in rest if word.startswith("--") and word[2:3].isalpha()]
        known = choices[name.split("|")[0]]._option_string_actions
        nested = [a for a in choices[name.split("|")[0]]._actions if isinstance(a.choices, dict)]
        for action in nested:
            for sub in action.choices.values():
                known = known | sub._option_string_actions
        assert [option for option in options if option not in known] == [], line


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path) if path else page
        if (ROOT / "docs" / "reference") in file.resolve().parents:
            continue  # written by `make docs`, which fails if it is missing
        assert file.exists(), f"{page.name}: {target}"
        if part:
            assert part in [anchor(h) for h in re.findall(r"^#+ (.*)$", file.read_text(), re.M)], (
                f"{page.name}: {target}"
            )


def test_there_is_something_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30
