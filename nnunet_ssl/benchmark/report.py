"""The results of a benchmark: ``results.json``, ``report.md`` and the learning curves."""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_ssl.benchmark.numbers import collect
from nnunet_ssl.benchmark.protocol import Row
from nnunet_ssl.benchmark.runs import Benchmark
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.compare import interval, p_value, signed
from nnunet_ssl.evaluation.metrics import METRICS, Metric, Options
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
    """Write ``results.json``, ``report.md`` and ``curves.png`` of the runs that are finished.

    Args:
        benchmark: the benchmark to report on.
        page: a Markdown file that receives the report between two marks; the pictures go next to it in ``figures/``.

    Returns:
        The Markdown.

    Raises:
        UserError: no run is finished, or the page has no marks.
    """
    results = collect(benchmark)
    name = benchmark.protocol.name
    draw_curves(benchmark, results, benchmark.home / "curves.png")
    write_json(str(benchmark.home / "results.json"), results)
    pictures = [
        Picture("learning_curves", "Learning curves", benchmark.home / "curves.png"),
        *figure_pictures(benchmark),
    ]
    text = "\n".join([*markdown(benchmark, results), *shown_pictures(pictures, benchmark.home), ""])
    write_text(str(benchmark.home / "report.md"), f"# {name}\n\n{text}")
    if page is not None:
        folder = page.parent / "figures"
        copies = [picture._replace(file=folder / f"{name}_{picture.name}.png") for picture in pictures]
        content = fill(page, name, [*markdown(benchmark, results), *shown_pictures(copies, page.parent)])
        folder.mkdir(exist_ok=True)
        for picture, copy in zip(pictures, copies, strict=True):
            with replacing(str(copy.file)) as temporary:
                shutil.copyfile(picture.file, temporary)
        write_text(str(page), content)
    return text


def fill(page: Path, name: str, lines: Sequence[str], writer: str = "nnUNetv2_ssl_benchmark") -> str:
    """The page with ``lines`` between two marks.

    Args:
        page: a Markdown file.
        name: in the marks, for instance of a protocol.
        lines: the text between them.
        writer: the command that the first mark names.

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
    if p.about:
        yield from (p.about, "")
    yield f"{p.configuration}, {p.plans}, {p.epochs} epochs. {EXPLANATION}"
    for content in results["tables"]:
        if not content["runs"]:
            continue
        labeled = content["labeled"] if content["labeled"] == "all" else f"{content['labeled']:g}"
        yield from ("", f"### {labeled} labeled, {_title(benchmark, content['budget'])}", "")
        yield from methods_table(benchmark, content["runs"], content["differences"])
        leading = METRICS[p.metrics[0]]
        first = [d for d in content["differences"] if d["metric"] == leading.key]
        others = [d for d in content["differences"] if d["metric"] != leading.key]
        if first:
            yield from ("", "Differences, row by row:", "", *differences_table(benchmark, first))
        if content["over_draws"]:
            yield from ("", *draws_text(benchmark, content["over_draws"]))
        if others:
            yield from ("", "<details><summary>Differences in the other metrics</summary>", "")
            yield from (*differences_table(benchmark, others), "", "</details>")
        if len(p.curve) > 1:
            yield from (
                "",
                f"{leading.title} during the training, mean over seeds:",
                "",
                *curve_table(benchmark, content["runs"]),
            )
    if results["unfinished"]:
        yield from ("", f"Not finished and left out above: {'; '.join(results['unfinished'])}.")
    if results["seconds_per_step"] and any(budget.steps is None for budget in p.budgets):
        names = {row.key: row.name for row in p.rows}
        seconds = ", ".join(f"{names[key]} {value:#.4g}" for key, value in results["seconds_per_step"].items())
        given = list(p.measure.seconds)
        which = "" if len(given) == len(p.rows) else f" ({', '.join(given)})"
        source = f", as given in the protocol{which}" if given else ", measured"
        yield from ("", f"Seconds per step on which equal time is based{source}: {seconds}.")
    for place in results["surroundings"]:
        threads = ", one thread per run" if place["device"] == "cpu" else ""
        versions = ", ".join(f"{k} {v}" for k, v in place.items() if k not in ("device", "machine"))
        yield from ("", f"Made on {place['machine']} ({place['device']}{threads}) with {versions}.")


def _title(benchmark: Benchmark, key: str) -> str:
    budget = next(budget for budget in benchmark.protocol.budgets if budget.key == key)
    if budget.steps is not None:
        return f"equal steps ({budget.steps:,})"
    if budget.minutes is not None:
        return f"equal time ({budget.minutes:g} minutes of training)"
    return f"equal time (as long as {budget.time_of} takes for {benchmark.protocol.equal_steps.steps:,} steps)"


def _rows(benchmark: Benchmark, runs: Sequence[dict[str, Any]]) -> Iterator[tuple[Row, dict[int, dict[str, Any]]]]:
    """Each row with its runs by seed."""
    for row in benchmark.protocol.rows:
        own = {run["seed"]: run for run in runs if run["row"] == row.name}
        if own:
            yield row, own


def methods_table(
    benchmark: Benchmark, runs: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]
) -> list[str]:
    """One row per method: steps, minutes, each metric, the leading one of groups or few classes, and of every seed.

    As in the papers' Table I: brackets show the gain over the method that this one is built on, the best value is
    bold. A row with other labels does not compete.
    """
    p = benchmark.protocol
    metrics = [METRICS[name] for name in p.metrics]
    leading, given = metrics[0], runs[0]["options"]
    options = Options(tuple(p.metrics), given["spacing"] == "mm", given["tolerance"], given["empty"])
    seeds = [seed for seed in p.seeds if any(run["seed"] == seed for run in runs)]
    parts = "groups" if runs[0]["groups"] else "classes"
    names = list(runs[0][parts]) if 1 < len(runs[0][parts]) <= 6 else []
    offline = any(row.offline for row in p.rows)
    first_metric = 4 if offline else 3  # column
    head = [
        "Method",
        "Steps",
        "Minutes",
        *(["Of these offline"] if offline else []),
        *(heading(metric, options) for metric in metrics),
        *names,
    ]
    head += [f"{leading.title}, seed {seed}" for seed in seeds]
    lines: list[tuple[Row, list[str]]] = []
    for row, own in _rows(benchmark, runs):
        first = next(iter(own.values()))
        title = row.name if row.labeled is None else f"{row.name} ({row.labeled} labeled)"
        cells = [title, f"{first['steps']:,}", f"{statistics.mean(run['minutes'] for run in own.values()):.1f}"]
        cells += [f"{row.offline or 0:.1f}"] if offline else []
        cells += [shown(m, nanmean(run["metrics"][m.key] for run in own.values())) for m in metrics]
        cells += [shown(leading, nanmean(run[parts][name] for run in own.values())) for name in names]
        cells += [shown(leading, own[seed]["metrics"][leading.key]) if seed in own else "" for seed in seeds]
        lines.append((row, cells))
    _embolden([cells for row, cells in lines if row.labeled is None], metrics, first_metric)
    gains = {(d["row"], d["metric"]): d["mean"] for d in differences}
    for row, cells in lines:
        for column, metric in enumerate(metrics, start=first_metric):
            gain = gains.get((row.name, metric.key), float("nan"))
            if row.against is not None and not np.isnan(gain):
                cells[column] += f" ({signed(metric, gain)})"
    return table([head, *(cells for _, cells in lines)])


def _embolden(rows: list[list[str]], metrics: Sequence[Metric], start: int) -> None:
    """Put the best of each metric's column, from ``start`` on, in bold, in place."""
    for column, metric in enumerate(metrics, start=start):
        values = [float(row[column]) for row in rows if row[column] != "–"]
        if values:
            best = (max if metric.higher_is_better else min)(values)
            for row in rows:
                if row[column] != "–" and float(row[column]) == best:
                    row[column] = f"**{row[column]}**"


def differences_table(benchmark: Benchmark, differences: Sequence[dict[str, Any]]) -> list[str]:
    """One line per row and metric: the difference of each seed, their mean, interval and p."""
    seeds = [seed for seed in benchmark.protocol.seeds if any(str(seed) in d["seeds"] for d in differences)]
    rows = [["Method", "Against", "Metric", *(f"Seed {seed}" for seed in seeds), "Mean", "95 % interval", "p"]]
    by_key = {metric.key: metric for metric in METRICS.values()}
    for d in differences:
        metric = by_key[d["metric"]]
        each = [signed(metric, d["seeds"][str(seed)]) if str(seed) in d["seeds"] else "" for seed in seeds]
        unit = metric.title if metric.is_distance else f"{metric.title} (%)"
        rows.append(
            [
                d["row"],
                d["against"],
                unit,
                *each,
                signed(metric, d["mean"]),
                interval(metric, d["low"], d["high"]),
                p_value(d["p"]),
            ]
        )
    return table(rows)


def draws_text(benchmark: Benchmark, content: dict[str, Any]) -> Iterator[str]:
    """The lines on the gains over labeled sets: an explanation and a table."""
    p = benchmark.protocol
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


def curve_table(benchmark: Benchmark, runs: Sequence[dict[str, Any]]) -> list[str]:
    """The leading metric at each point of the curve, mean over seeds."""
    leading = METRICS[benchmark.protocol.metrics[0]]
    rows = [["Method", *(f"{100 * share:g} % of the training" for share in benchmark.protocol.curve)]]
    for row, own in _rows(benchmark, runs):
        curves = [[point[leading.key] for point in run["curve"]] for run in own.values()]
        rows.append([row.name, *(shown(leading, nanmean(values)) for values in zip(*curves, strict=True))])
    return table(rows)


# ------------------------------------------------------------------------------------------------------------ figure


def draw_curves(benchmark: Benchmark, results: dict[str, Any], file: Path) -> None:
    """The leading metric over steps, or over minutes if the budget is in time; one panel per table.

    The mean over seeds; for few methods also a thin line for every seed. A method has the colour of the one that it is
    compared with, dashed.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    p = benchmark.protocol
    leading = METRICS[p.metrics[0]]
    contents = [content for content in results["tables"] if content["runs"]]
    seconds = {row.name: results["seconds_per_step"].get(row.key) for row in p.rows}
    with style.context("default"):
        figure = Figure(figsize=(5.2 * len(contents) + 1.8, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(contents), squeeze=False, sharey=True)[0]
        styles = dict(zip((row.name for row in p.rows), line_styles(p.rows), strict=True))
        drawn = {}
        for panel, content in zip(panels, contents, strict=True):
            in_steps = content["budget"].startswith("steps")
            rows = list(_rows(benchmark, content["runs"]))
            for row, own in rows:
                colour, dashes = styles[row.name]
                curves = [_points(run, leading, in_steps, seconds[row.name], row.offline or 0) for run in own.values()]
                for x, y in curves if len(rows) <= MAX_WITH_SEEDS else ():
                    panel.plot(x, y, color=colour, linestyle=dashes, alpha=0.35, linewidth=0.8)
                x, y = (np.mean(values, axis=0) for values in zip(*curves, strict=True))
                drawn[row.name] = panel.plot(x, y, color=colour, linestyle=dashes, marker="o", markersize=4)[0]
            panel.set_title(f"{content['labeled']} labeled, {_title(benchmark, content['budget'])}", fontsize=9)
            panel.set_xlabel("training steps" if in_steps else "minutes of training, from the seconds per step")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(f"test {leading.title}, mean of the classes")
        names = [row.name for row in p.rows if row.name in drawn]
        figure.legend([drawn[name] for name in names], names, fontsize=8, loc="outside right upper")
        with replacing(str(file)) as temporary:
            figure.savefig(temporary, format="png", dpi=130)


def line_styles(rows: Sequence[Row]) -> Iterator[tuple[Any, str]]:
    """Colour and line style of each row."""
    from matplotlib import colormaps

    palette = itertools.cycle([*colormaps["tab10"].colors, *colormaps["Dark2"].colors])
    families: dict[str, tuple[Any, Iterator[str]]] = {}  # by the row that others are compared with
    for row in rows:
        if row.against in families:
            colour, dashes = families[row.against]
            families[row.name] = colour, dashes
            yield colour, next(dashes)
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
