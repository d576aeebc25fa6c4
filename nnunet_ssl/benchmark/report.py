"""The results of a benchmark: ``results.json``, ``report.md`` and the learning curves."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_ssl.benchmark.numbers import collect
from nnunet_ssl.benchmark.protocol import Protocol, Row
from nnunet_ssl.benchmark.runs import Benchmark
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.compare import best_in_bold, interval, p_value, signed, with_gain
from nnunet_ssl.evaluation.metrics import METRICS, Metric
from nnunet_ssl.evaluation.summary import heading, nanmean, shown, table
from nnunet_ssl.files import read_text, replacing, write_json, write_text

MAX_WITH_SEEDS = 6  # methods; with more, the lines of every seed become a tangle
EXPLANATION = (
    "Each value is the mean over classes of their means over test cases; the table shows the mean over seeds. The "
    "difference of two rows is computed case by case, within a seed, over the classes that are defined for both. The "
    "interval (95 %, bootstrap) and p (Wilcoxon signed-rank, two-sided, not corrected) are computed over cases, from "
    "differences averaged over seeds. They describe the variation between patients, not between seeds or labeled "
    "sets; for that, see the columns of the seeds. If the dataset has a groups.json, the cases of one patient count "
    "as one."
)
DRAWS_EXPLANATION = (
    "this covers variation between labeled sets as well as between {units}. Interval: 95 %, bootstrap over labeled "
    "sets and {units}, which are resampled independently. t-interval and p: Student's, over the labeled sets' means "
    "only, for these {units}; p is corrected for the number of rows (Holm). A claim needs both."
)


def write_report(benchmark: Benchmark, page: Path | None = None) -> str:
    """Write ``results.json``, ``report.md`` and ``curves.png`` of the runs that are finished, and return the Markdown.

    A Markdown ``page`` receives the report between two marks; the pictures go next to it in ``figures/``.

    Raises:
        UserError: no run is finished, or the page has no marks.
    """
    results = collect(benchmark)
    name, home = benchmark.protocol.name, benchmark.home
    draw_curves(benchmark, results, home / "curves.png")
    write_json(home / "results.json", results)
    pictures = [Picture("learning_curves", "Learning curves", home / "curves.png"), *figure_pictures(benchmark)]
    lines = list(markdown(benchmark, results))
    text = "\n".join([*lines, *shown_pictures(pictures, home), ""])
    write_text(home / "report.md", f"# {name}\n\n{text}")
    if page is not None:
        folder = page.parent / "figures"
        copies = [picture._replace(file=folder / f"{name}_{picture.name}.png") for picture in pictures]
        content = fill(page, name, [*lines, *shown_pictures(copies, page.parent)])
        folder.mkdir(exist_ok=True)
        for picture, copy in zip(pictures, copies, strict=True):
            with replacing(copy.file) as temporary:
                shutil.copyfile(picture.file, temporary)
        write_text(page, content)
    return text


def fill(page: Path, name: str, lines: Sequence[str], writer: str = "nnUNetv2_ssl_benchmark") -> str:
    """The Markdown page with ``lines`` between its two marks, which have ``name`` in them, and ``writer``, a command.

    Raises:
        UserError: there is no page, or the marks are not in it.
    """
    begin, end = f"<!-- {name}: written by {writer} -->", f"<!-- {name}: end -->"
    text = read_text(page, "Name a Markdown page with --page.") if page.is_file() else ""
    if begin not in text or end not in text:
        raise UserError(f"{page} has no lines '{begin}' and '{end}' for the report to go between; add them.")
    return "\n".join([text.split(begin)[0] + begin, "", *lines, "", end + text.split(end)[1]])


class Picture(NamedTuple):
    """A picture of the report: its name in file names, its title, and its file."""

    name: str
    title: str
    file: Path


def figure_pictures(benchmark: Benchmark) -> Iterator[Picture]:
    """The figures of the first labeled set by ``nnUNetv2_ssl_figures``, with their captions' titles."""
    table = next((table for table, _ in benchmark.figures()), None)
    files = sorted((benchmark.home / "figures" / table.key).glob("*.png")) if table else []
    for file in files:
        caption = file.with_suffix(".md")
        text = read_text(caption, "Remove it, or draw the figures again.") if caption.is_file() else ""
        bold = re.match(r"\*\*(.+?)\.?\*\*", text)
        title = bold[1] if bold else file.stem.replace("_", " ").capitalize()
        # "curves" alone would suggest the learning curves of the report
        yield Picture("training_curves" if file.stem == "curves" else file.stem, title, file)


def shown_pictures(pictures: Sequence[Picture], folder: Path) -> Iterator[str]:
    """Lines of Markdown that show pictures, each with its title, on a page in ``folder``."""
    for picture in pictures:
        place = picture.file.relative_to(folder).as_posix()
        yield from ("", f"![{picture.title}]({place})", "", f"*{picture.title}.*")


# ------------------------------------------------------------------------------------------------------------- text


def markdown(benchmark: Benchmark, results: dict[str, Any]) -> Iterator[str]:
    """The lines of the report, without its title and figure."""
    p = benchmark.protocol
    leading = METRICS[p.metrics[0]]
    if p.about:
        yield from (p.about, "")
    yield f"{p.configuration}, {p.plans}, {p.epochs} epochs. {EXPLANATION}"
    for content in results["tables"]:
        if not content["runs"]:
            continue
        labeled = content["labeled"] if content["labeled"] == "all" else f"{content['labeled']:g}"
        yield from ("", f"### {labeled} labeled, {_title(p, content['budget'])}", "")
        yield from methods_table(p, content["runs"], content["differences"])
        first = [d for d in content["differences"] if d["metric"] == leading.key]
        others = [d for d in content["differences"] if d["metric"] != leading.key]
        if first:
            yield from ("", "Differences, row by row:", "", *differences_table(first))
        if content["over_draws"]:
            yield from ("", *draws_text(p, content["over_draws"]))
        if others:
            yield from ("", "<details><summary>Differences in the other metrics</summary>", "")
            yield from (*differences_table(others), "", "</details>")
        if len(p.curve) > 1:
            yield from (
                "",
                f"{leading.title} during the training, mean over seeds:",
                "",
                *curve_table(p, content["runs"]),
            )
    if results["unfinished"]:
        yield from ("", f"Not finished and left out above: {'; '.join(results['unfinished'])}.")
    if results["seconds_per_step"] and any(budget.steps is None for budget in p.budgets):
        names = {row.key: row.name for row in p.rows}
        seconds = ", ".join(f"{names[key]} {value:#.4g}" for key, value in results["seconds_per_step"].items())
        given = f"as given in the protocol for {', '.join(p.measure.seconds)}" if p.measure.seconds else "measured"
        yield from ("", f"Seconds per step on which equal time is based, {given}: {seconds}.")
    for place in results["surroundings"]:
        threads = ", one thread per run" if place["device"] == "cpu" else ""
        versions = ", ".join(f"{k} {v}" for k, v in place.items() if k not in ("device", "machine"))
        yield from ("", f"Made on {place['machine']} ({place['device']}{threads}) with {versions}.")


def _title(p: Protocol, key: str) -> str:
    budget = next(budget for budget in p.budgets if budget.key == key)
    if budget.steps is not None:
        return f"equal steps ({budget.steps:,})"
    if budget.minutes is not None:
        return f"equal time ({budget.minutes:g} minutes of training)"
    return f"equal time (as long as {budget.time_of} takes for {p.equal_steps.steps:,} steps)"


def _rows(p: Protocol, runs: Sequence[dict[str, Any]]) -> Iterator[tuple[Row, dict[int, dict[str, Any]]]]:
    """Each row with its runs by seed."""
    for row in p.rows:
        if own := {run["seed"]: run for run in runs if run["row"] == row.name}:
            yield row, own


def methods_table(p: Protocol, runs: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> list[str]:
    """One row per method: steps, minutes, each metric, the leading one of groups or few classes, and of every seed.

    As in the papers' Table I: brackets show the gain over the method that this one is built on, the best value is
    bold. A row with other labels, or without some of the seeds, does not compete.
    """
    rows, by_seed = map(list, zip(*_rows(p, runs), strict=True))
    options, leading = runs[0]["options"], METRICS[p.metrics[0]]
    parts = "groups" if runs[0]["groups"] else "classes"
    gains = {(d["row"], d["metric"]): d["mean"] for d in differences}

    def means(*way: str) -> list[float]:
        """Of each row, over its seeds, what is found by its keys in a run."""
        return [nanmean(reduce(getitem, way, run) for run in own.values()) for own in by_seed]

    titles = [_title_of_row(p, row, own) for row, own in zip(rows, by_seed, strict=True)]
    competes = [title == row.name for title, row in zip(titles, rows, strict=True)]
    columns = [["Method", *titles], ["Steps", *(f"{steps:,.0f}" for steps in means("steps"))]]
    columns.append(["Minutes", *(f"{minutes:.1f}" for minutes in means("minutes"))])
    if any(row.offline for row in rows):
        columns.append(["Of these offline", *(f"{row.offline or 0:.1f}" for row in rows)])
    for metric in (METRICS[name] for name in p.metrics):
        cells = best_in_bold(metric, means("metrics", metric.key), competes)
        gained = [gains.get((row.name, metric.key), math.nan) if row.against else math.nan for row in rows]
        unit = "mm" if options["spacing"] == "mm" else "voxels"
        columns.append([heading(metric, unit), *map(partial(with_gain, metric), cells, gained)])
    if 1 < len(runs[0][parts]) <= 6:
        columns += [[name, *(shown(leading, mean) for mean in means(parts, name))] for name in runs[0][parts]]
    for seed in (seed for seed in p.seeds if any(seed in own for own in by_seed)):
        own_cells = [shown(leading, own[seed]["metrics"][leading.key]) if seed in own else "" for own in by_seed]
        columns.append([f"{leading.title}, seed {seed}", *own_cells])
    return table([*zip(*columns, strict=True)])


def _title_of_row(p: Protocol, row: Row, own: dict[int, Any]) -> str:
    """Its name, and what sets its mean apart from the others': other labels, or seeds that are not finished."""
    notes = [] if row.labeled is None else [f"{row.labeled} labeled"]
    notes += [f"{len(own)} of {len(p.seeds)} seeds"] if len(own) < len(p.seeds) else []
    return f"{row.name} ({', '.join(notes)})" if notes else row.name


def differences_table(differences: Sequence[dict[str, Any]]) -> list[str]:
    """One line per row and metric: the difference of each seed, their mean, interval and p."""
    seeds = list(dict.fromkeys(seed for d in differences for seed in d["seeds"]))
    rows = [["Method", "Against", "Metric", *(f"Seed {seed}" for seed in seeds), "Mean", "95 % interval", "p"]]
    by_key = {metric.key: metric for metric in METRICS.values()}
    for d in differences:
        metric = by_key[d["metric"]]
        cells = [d["row"], d["against"], metric.title if metric.is_distance else f"{metric.title} (%)"]
        cells += [signed(metric, d["seeds"][seed]) if seed in d["seeds"] else "" for seed in seeds]
        cells += [signed(metric, d["mean"]), interval(metric, d["low"], d["high"]), p_value(d["p"])]
        rows.append(cells)
    return table(rows)


def draws_text(p: Protocol, content: dict[str, Any]) -> Iterator[str]:
    """The lines on what rows gain over labeled sets: what they are, and a table."""
    leading = METRICS[p.metrics[0]]
    units = "patients" if content["of_patients"] else "cases"
    about = f"Over {content['draws']} labeled sets and {content['units']} {units}, {leading.title}:"
    yield from (f"{about} {DRAWS_EXPLANATION.format(units=units)}", "")
    rows = [["Method", "Against", "Mean", "95 % interval", "t-interval", "p (t, Holm)"]]
    if p.gap:
        rows[0] += [f"Share of the gap from {p.gap.lower} to {p.gap.upper}", "95 % interval of the share"]
    for line in content["rows"]:
        cells = [line["row"], line["against"], signed(leading, line["mean"])]
        cells += [interval(leading, line["low"], line["high"]), interval(leading, line["t_low"], line["t_high"])]
        cells.append(p_value(line["p_holm"]))
        if p.gap:
            known = not np.isnan(line["share"])
            cells.append(f"{100 * line['share']:.0f} %" if known else "–")
            cells.append(f"{100 * line['share_low']:.0f} to {100 * line['share_high']:.0f} %" if known else "–")
        rows.append(cells)
    yield from table(rows)


def curve_table(p: Protocol, runs: Sequence[dict[str, Any]]) -> list[str]:
    """The leading metric at each point of the curve, mean over seeds."""
    leading = METRICS[p.metrics[0]]
    rows = [["Method", *(f"{100 * share:g} % of the training" for share in p.curve)]]
    for row, own in _rows(p, runs):
        curves = [[point[leading.key] for point in run["curve"]] for run in own.values()]
        title = _title_of_row(p, row, own)
        rows.append([title, *(shown(leading, nanmean(values)) for values in zip(*curves, strict=True))])
    return table(rows)


# ------------------------------------------------------------------------------------------------------------ figure


def draw_curves(benchmark: Benchmark, results: dict[str, Any], file: Path) -> None:
    """The leading metric over steps, or over minutes if the budget is in time; one panel per table.

    The mean over seeds; for few methods also a thin line for every seed. A method has the color of the one that it is
    compared with, dashed.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    p = benchmark.protocol
    leading = METRICS[p.metrics[0]]
    contents = [content for content in results["tables"] if content["runs"]]
    with style.context("default"):
        figure = Figure(figsize=(5.2 * len(contents) + 1.8, 4.6), layout="constrained")
        panels = figure.subplots(1, len(contents), squeeze=False, sharey=True)[0]
        styles = dict(zip((row.name for row in p.rows), line_styles(p.rows), strict=True))
        drawn = {}
        for panel, content in zip(panels, contents, strict=True):
            in_steps = content["budget"].startswith("steps")
            rows = list(_rows(p, content["runs"]))
            for row, own in rows:
                look = dict(zip(("color", "linestyle"), styles[row.name], strict=True))
                seconds = results["seconds_per_step"].get(row.key)
                curves = [_points(run, leading, in_steps, seconds, row.offline or 0) for run in own.values()]
                for curve in curves if len(rows) <= MAX_WITH_SEEDS else ():
                    panel.plot(*curve, alpha=0.35, linewidth=0.8, **look)
                drawn[row.name] = panel.plot(*np.mean(curves, axis=0), marker="o", markersize=4, **look)[0]
            panel.set_title(f"{content['labeled']} labeled, {_title(p, content['budget'])}", fontsize=9)
            panel.set_xlabel("training steps" if in_steps else "minutes of training, by the seconds per step")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(f"test {leading.title}, mean of the classes")
        figure.legend(drawn.values(), drawn, fontsize=8, loc="outside right upper")
        with replacing(file) as temporary:
            figure.savefig(temporary, format="png", dpi=130)


def line_styles(rows: Sequence[Row]) -> Iterator[tuple[Any, str]]:
    """Color and line style of each row."""
    from matplotlib import colormaps

    palette = itertools.cycle([*colormaps["tab10"].colors, *colormaps["Dark2"].colors])
    families: dict[str, tuple[Any, Iterator[str]]] = {}  # by the row that others are compared with
    for row in rows:
        if row.against in families:
            color, dashes = families[row.against]
            families[row.name] = color, dashes
            yield color, next(dashes)
        else:
            families[row.name] = next(palette), itertools.cycle(["--", "-.", ":"])
            yield families[row.name][0], "-"


def _points(
    run: dict[str, Any], metric: Metric, in_steps: bool, seconds: float | None, offline: float = 0
) -> tuple[list[float], list[float]]:
    """The metric at each point of a run's curve, over steps or minutes, the ``offline`` ones included.

    Minutes are by the seconds per step, as the budget is, since a run may have shared the machine with others.
    """
    seconds = 60 * (run["minutes"] - offline) / run["steps"] if seconds is None else seconds
    scale, begin = (1.0, 0.0) if in_steps else (seconds / 60, offline)
    return [begin + point["steps"] * scale for point in run["curve"]], [point[metric.key] for point in run["curve"]]
