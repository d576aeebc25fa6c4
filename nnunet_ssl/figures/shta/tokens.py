"""Figure 3: tokens in two dimensions, before the last layer and in SHTA's embedding.

As Fig. 6 of the SHTA paper: the same tokens as the host sees them, as the network trained with SHTA sees them, and
after the embedding head, there with the class proxies. The tokens are drawn at random by a seed, as many of each class
where there are. One class alone would show nothing, so the background is shown too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures.options import FigureOptions, NotApplicable
from nnunet_ssl.figures.page import caption, column_width, panel_grid, paper_style, save_figure
from nnunet_ssl.figures.runs import TrainedRun
from nnunet_ssl.figures.shta.branch import BACKGROUND
from nnunet_ssl.figures.shta.survey import RULE, TOKENS_PER_CLASS, Survey, survey
from nnunet_ssl.figures.test_set import Case, cases_in_words

PERPLEXITY = 30
METHODS = {"pca": "PCA", "tsne": "t-SNE"}
PROXY = "class proxy"
OTHER_PLANS = "whose plans prepare images differently from the plans of the run with SHTA"
MARKERS = "osD^vP"  # in addition to color, for readers who cannot see it; the background's is X


@dataclass(frozen=True)
class Space:
    """The same N tokens in one space."""

    title: str  # in the figure
    points: np.ndarray  # [N, C]
    proxies: np.ndarray | None = None  # [classes, C], where the space has any


def draw_tokens(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``tokens``.

    Raises:
        NotApplicable: no run was trained with SHTA, or fewer than two classes have tokens.
        UserError: a model or its branch cannot be read, or there is no scikit-learn.
    """
    if find_spec("sklearn") is None:
        raise UserError('tokens need scikit-learn, which is not installed: pip install "nnunet-ssl[figures]".')
    found = survey(tuple(runs), tuple(cases), tuple(options.names), options.device, options.seed)
    sample, shta = found.sample, found.compared[-1]
    if found.left_out is not None:
        print(f"tokens are drawn without {found.left_out.name}, {OTHER_PLANS}.", flush=True)
    classes = [label for label in _names(options) if (sample.classes == label).sum() > 1]
    if len(classes) < 2:
        raise NotApplicable(
            f"{cases_in_words(cases)} have tokens of fewer than two of the classes "
            f"{', '.join(options.names.values())}. Name more with --classes."
        )
    shown = np.isin(sample.classes, classes)
    spaces = [Space(f"{run.name}: decoder feature", sample.features[run.name][shown]) for run in found.compared]
    spaces.append(Space(f"{shta.name}: embedding", sample.embedding[shown], found.proxies[classes]))
    with paper_style():
        figure = tokens_figure(spaces, sample.classes[shown], classes, options)
        save_figure(figure, out, "tokens", _caption(spaces, found, classes, cases, options))


def _names(options: FigureOptions) -> dict[int, str]:
    return {**options.names, 0: "background"}


def in_two_dimensions(space: Space, method: str, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Lay out the points of a space, three or more, in a plane, by ``pca`` or ``tsne``.

    Returns:
        ``[N, 2]``, and the proxies' places ``[classes, 2]`` where the method has a place for them: PCA is a projection
        and shows them where they are, t-SNE has none for points that it did not lay out.
    """
    from sklearn.decomposition import PCA  # of the extra "figures"
    from sklearn.manifold import TSNE

    if method == "pca":
        pca = PCA(2, random_state=seed).fit(space.points)
        return pca.transform(space.points), None if space.proxies is None else pca.transform(space.proxies)
    perplexity = min(PERPLEXITY, (len(space.points) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(space.points), None


def tokens_figure(spaces: Sequence[Space], classes: np.ndarray, shown: Sequence[int], options: FigureOptions) -> Figure:
    """Rows: methods. Columns: spaces of the same tokens, of ``classes`` ``[N]``; ``shown`` in the order of colors."""
    width = column_width(2)
    names = _names(options)
    colors = {**options.colors, 0: BACKGROUND}
    markers = {**{label: MARKERS[i % len(MARKERS)] for i, label in enumerate(options.names)}, 0: "X"}
    dots = {"linestyle": "", "markersize": 4}
    handles = [Line2D([], [], color=colors[k], marker=markers[k], label=names[k], **dots) for k in shown]
    if "pca" in options.embedding:
        star = {"marker": "*", "markersize": 8, "color": "white", "markeredgecolor": "black", "markeredgewidth": 0.7}
        handles.append(Line2D([], [], linestyle="", label=PROXY, **star))
    titles = [space.title for space in spaces]
    figure, grid = panel_grid(len(options.embedding), titles, width, min(width / len(spaces), 2.4), handles)
    # all classes in mixed order, so that none hides another
    parts = np.array_split(np.random.default_rng(options.seed).permutation(len(classes)), min(20, len(classes)))
    for row, method in zip(grid, options.embedding, strict=True):
        row[0].set_ylabel(METHODS[method])
        for axes, space in zip(row, spaces, strict=True):
            points, proxies = in_two_dimensions(space, method, options.seed)
            for part, label in itertools.product(parts, shown):
                mine = part[classes[part] == label]
                axes.scatter(
                    *points[mine].T, s=5, marker=markers[label], c=colors[label], alpha=0.7, linewidths=0,
                    rasterized=True,
                )  # fmt: skip
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
            if proxies is not None:
                axes.scatter(
                    *proxies.T, s=70, marker="*", c=[colors[label] for label in shown], edgecolors="black",
                    linewidths=0.7, zorder=3,
                )  # fmt: skip
    return figure


def silhouettes(points: np.ndarray, classes: np.ndarray, shown: Sequence[int]) -> list[float]:
    """Mean silhouette of each class in the full space, from -1 (among others) to 1 (compact and apart)."""
    from sklearn.metrics import silhouette_samples

    values = silhouette_samples(points, classes)
    return [float(values[classes == label].mean()) for label in shown]


def _caption(
    spaces: Sequence[Space], found: Survey, classes: Sequence[int], cases: Sequence[Case], options: FigureOptions
) -> str:
    sample, names = found.sample, _names(options)
    shown = np.isin(sample.classes, classes)
    by_space = [silhouettes(space.points, sample.classes[shown], classes) for space in spaces]
    rows = [["Class", "Tokens drawn", "of", *(f"silhouette, {space.title}" for space in spaces)]]
    for i, label in enumerate(classes):
        drawn = int((sample.classes == label).sum())
        values = [f"{means[i]:.3f}" for means in by_space]
        rows.append([names[label], str(drawn), str(sample.total[label]), *values])
    rows.append(["mean", "", "", *(f"{np.mean(means):.3f}" for means in by_space)])
    rule = RULE
    if 0 in classes:
        rule += " Background: tokens without any foreground, from patches that have such tokens, because one class "
        rule += "alone would show nothing."
    left_out = ""
    if without := [name for label, name in options.names.items() if label not in classes]:
        left_out += f"\n\nNot shown, because they have no tokens: {', '.join(without)}."
    if found.left_out:
        left_out += f"\n\nNot shown: {found.left_out.name}, {OTHER_PLANS}."
    return caption(
        "tokens",
        stride=" x ".join(map(str, found.stride)),
        rule=rule,
        per_class=TOKENS_PER_CLASS,
        seed=options.seed,
        perplexity=PERPLEXITY,
        left_out=left_out,
        table="\n".join(table(rows)),
        cases=cases_in_words(cases),
        models="\n".join(f"- {run.name}: `{run.checkpoint_file}`" for run in found.compared),
    )
