"""The documentation and the code say the same."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def commands_of_setup() -> set[str]:
    """The commands that an installation gets, read from setup.py without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "COMMANDS":
            return {f"nnUNetv2_ssl_{verb}" for verb in ast.literal_eval(node.value)}
    raise AssertionError("setup.py has no COMMANDS")


def without_code(text: str) -> str:
    """Markdown without fenced and inline code, which holds no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    missing = [
        target
        for target in targets
        if not re.match(r"[a-z]+:|#", target) and not (page.parent / target.split("#")[0]).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_that_are_named_exist(page):
    named = set(re.findall(r"nnUNetv2_ssl_[a-z]+", page.read_text(encoding="utf-8")))
    assert named <= commands_of_setup()


def test_every_page_is_listed():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"(docs/{p.name})" not in readme] == []
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs" / "results").glob("*.md") if f"(results/{p.name})" not in results] == []


def test_every_command_has_its_help_on_the_site():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", page, re.M)) == commands_of_setup()


def test_every_trainer_has_a_section():
    from nnunet_ssl.trainers import TRAINERS

    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (nnUNetTrainer[\w*]+): ", page, re.M)
    assert [name for name in TRAINERS if not any(fnmatch(name, section) for section in sections)] == []
    assert [section for section in sections if not any(fnmatch(name, section) for name in TRAINERS)] == []


def test_readme_lists_trainers_that_there_are():
    from nnunet_ssl.trainers import TRAINERS

    rows = re.findall(r"^\| `(nnUNetTrainer\w+)` ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert rows
    assert set(rows) <= set(TRAINERS)


@pytest.mark.usefixtures("curves")
def test_files_and_columns_of_a_run_are_documented(tiny, make_trainer):
    trainer = make_trainer("nnUNetTrainerSHTA_CPS_1epochs", tiny("3d"), settings={"keep_epochs": [1]})
    trainer.run_training()
    folder = Path(trainer.output_folder)
    text = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")

    columns = (folder / "ssl_log.csv").read_text().splitlines()[0].split(",")
    of_class = re.compile(rf"^(candidates|hard)_({'|'.join(trainer._foreground_classes.values())})$")
    columns = {of_class.sub(r"\1_<class>", column) for column in columns}
    table = text.split("## ssl_log.csv")[1].split("What to look for")[0]
    assert set(re.findall(r"`([\w<>]+)`", "".join(re.findall(r"^\| `.*?\|", table, re.M)))) == columns

    known = {"training_log", "debug.json", "progress.png"}  # nnU-Net's
    assert (folder / "progress_ssl.png").stat().st_size > 5000
    new = [f.name for f in folder.iterdir() if f.is_file() and not any(f.name.startswith(k) for k in known)]
    kinds = {"checkpoint_epoch1.pth": "checkpoint_epoch<N>.pth", "checkpoint_final_ssl.pth": "checkpoint_final_ssl.pth"}
    states = re.compile(r"checkpoint_(best|epoch1)_ssl.pth")  # "checkpoint_final_ssl.pth, ..."
    assert [name for name in new if not states.fullmatch(name) and f"`{kinds.get(name, name)}`" not in text] == []
