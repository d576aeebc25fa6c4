"""What ``mkdocs.yml`` cannot say: the site's pages that are made from files elsewhere."""

from __future__ import annotations

import importlib
import io
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FILES = {"README.md": "index.md"}  # the site's first page
FILES |= {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE")}


def on_files(files: Files, config: Any) -> Files:
    """Adds the files at the root of the repository."""
    for name, uri in FILES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Resolves links to those files, adds the commands' help, and lets Markdown be in what unfolds."""
    markdown = re.sub(r"\]\((?:\.\./)+(?=[A-Z])", lambda _: "](" + "../" * page.url.count("/"), markdown)
    if page.file.src_uri == "commands.md":
        named = dict.fromkeys(re.findall(r"^\| `nnUNetv2_ssl_(\w+)`", markdown, re.M))
        markdown += "".join(f"\n## nnUNetv2_ssl_{verb}\n\n```text\n{help_of(verb)}```\n" for verb in named)
    return markdown.replace("<details>", '<details markdown="1">')


def on_page_content(html: str, **_: Any) -> str:
    """The docstrings' ``:func:`~a.b.name``` as plain code."""
    return re.sub(r":(?:func|class|meth):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)


def help_of(verb: str) -> str:
    """What ``nnUNetv2_ssl_<verb> --help`` prints."""
    command, out = importlib.import_module(f"nnunet_ssl.commands.{verb}"), io.StringIO()
    with redirect_stdout(out), suppress(SystemExit), mock.patch.dict("os.environ", COLUMNS="100"):
        command.main(["--help"])
    return out.getvalue()
