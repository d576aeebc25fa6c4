"""The pages say what the settings are, and no settings are missing there."""

from __future__ import annotations

import pytest
import settings_page

PAGES = [page.read_text(encoding="utf-8") for page in settings_page.PAGES]
TEXT = PAGES[0]


def test_the_pages_are_current() -> None:
    assert settings_page.with_tables(PAGES) == PAGES, "run `make settings`"


def test_a_changed_default_is_put_right() -> None:
    spoiled = TEXT.replace("| `cps_rampup` | | `0.4` | `1.0` |", "| `cps_rampup` | | `0.9` | |")
    assert spoiled != TEXT
    assert settings_page.with_tables([spoiled, *PAGES[1:]]) == PAGES


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ("TwinSettings CPSSettings", "CrossSupervisionSettings"),
        ("TwinSettings CrossSupervisionSettings CPS", "CPS, CPSSettings"),
    ],
)
def test_a_class_without_a_table_and_a_table_without_a_class_are_refused(names: str, wrong: str) -> None:
    page = TEXT.replace("settings: TwinSettings CrossSupervisionSettings CPSSettings", f"settings: {names}")
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        settings_page.with_tables([page, *PAGES[1:]])


def test_every_setting_has_a_line_of_its_own() -> None:
    for name, cls in settings_page.classes_with_settings().items():
        for setting in settings_page.own_settings(cls):
            assert settings_page.about(settings_page.fields_of(cls)[setting])["meaning"], f"{name}.{setting}"
