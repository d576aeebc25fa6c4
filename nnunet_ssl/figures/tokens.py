"""Figure 3: foreground tokens in two dimensions, before the last layer and in SHTA's embedding.

As Fig. 6 of the SHTA paper: the same tokens as the host sees them, as the network trained with SHTA sees them, and
after the embedding head, there with the class proxies. The tokens are drawn at random by a seed, as many of each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from tqdm import tqdm

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.summary import table
from nnunet_ssl.figures.page import (
    class_colors,
    column_width,
    legend_columns,
    new_figure,
    paper_style,
    save_figure,
    wrapped,
)
from nnunet_ssl.figures.runs import Case, FigureOptions, NotApplicable, TrainedRun, cases_in_words
from nnunet_ssl.figures.shta_tokens import (
    Tokens,
    baseline_and_shta,
    cut_patches,
    load_branch,
    load_model,
    read_tokens,
)
from nnunet_ssl.randomness import derived_seed

TOKENS_PER_CLASS = 400  # at most
PERPLEXITY = 30
METHODS = {"pca": "PCA", "tsne": "t-SNE"}
PROXY = "class proxy"
MARKERS = "osD^vP"  # beside colour, for readers without it


@dataclass(frozen=True)
class Space:
    """The same N tokens in one space.

    Attributes:
        title: in the figure.
        points: ``[N, C]``.
        proxies: ``[classes, C]``, or None where the space has none.
    """

    title: str
    points: np.ndarray
    proxies: np.ndarray | None = None


def draw_tokens(runs: Sequence[TrainedRun], cases: Sequence[Case], out: Path, options: FigureOptions) -> None:
    """Write ``tokens``.

    Raises:
        NotApplicable: no run was trained with SHTA.
        UserError: the branch cannot be read, or fewer than two of the classes have tokens.
    """
    host, shta = baseline_and_shta(runs)
    if shta is None:
        raise NotApplicable("none of the trainers has SHTA's tokens. Add one whose name has SHTA_ with -tr.")
    compared = [run for run in (host, shta) if run is not None]
    models = {run.name: load_model(run, options.device) for run in compared}
    branch = load_branch(shta, models[shta.name])
    sample = ClassSample(TOKENS_PER_CLASS, options.seed)
    for case in tqdm(cases, "Reading tokens"):
        patches = cut_patches(models[shta.name], branch, case)
        if len(patches.images):
            sample.add({run.name: read_tokens(models[run.name], branch, patches, run is shta) for run in compared})
    classes = [label for label in options.names if (sample.classes == label).sum() > 1]
    if len(classes) < 2:
        raise UserError(
            f"{cases_in_words(cases)} have tokens of fewer than two of the classes "
            f"{', '.join(options.names.values())}. Name more with --classes."
        )
    shown = np.isin(sample.classes, classes)
    spaces = [Space(f"{run.name}: decoder feature", sample.features[run.name][shown]) for run in compared]
    proxies = F.normalize(branch.loss.proxies.detach().cpu(), dim=1)[classes].numpy()
    spaces.append(Space(f"{shta.name}: embedding", sample.embedding[shown], proxies))
    with paper_style():
        figure = tokens_figure(spaces, sample.classes[shown], classes, options)
        caption = _caption(spaces, sample, classes, compared, branch.stride, cases, options)
        save_figure(figure, out, "tokens", caption)


class ClassSample:
    """At most ``size`` tokens of each class, each token of all cases with the same chance, in one pass.

    Every token draws a number by the seed and its case; the lowest numbers of a class stay. Which tokens these are
    depends on the labels alone, so all runs show the same ones.

    Args:
        size: tokens of a class.
        seed: of the draw.

    Attributes:
        classes: ``[N]``.
        features: name of a run -> ``[N, C]``, the mean decoder feature.
        embedding: ``[N, C_z]``, of unit length, since Eq. 3 compares directions.
        total: label -> how many tokens there were to draw from.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.classes = np.empty(0, int)
        self.draws = np.empty(0)
        self.features: dict[str, np.ndarray] = {}
        self.embedding: np.ndarray | None = None
        self.total: dict[int, int] = {}

    def add(self, seen: Mapping[str, Tokens]) -> None:
        """Take the tokens of one case, as each run sees them; the last one has the embedding."""
        last = list(seen.values())[-1]
        classes = last.classes.numpy()
        for label, count in zip(*np.unique(classes, return_counts=True), strict=True):
            self.total[int(label)] = self.total.get(int(label), 0) + int(count)
        rng = np.random.default_rng(derived_seed(self.seed, "tokens", last.case))
        self.classes = np.concatenate([self.classes, classes])
        self.draws = np.concatenate([self.draws, rng.random(len(classes))])
        keep = lowest_of_each_class(self.classes, self.draws, self.size)
        self.classes, self.draws = self.classes[keep], self.draws[keep]
        for name, tokens in seen.items():
            self.features[name] = _joined(self.features.get(name), tokens.feature.numpy())[keep]
        self.embedding = _joined(self.embedding, F.normalize(last.embedding, dim=1).numpy())[keep]


def _joined(before: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    return new if before is None else np.concatenate([before, new])


def lowest_of_each_class(classes: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """Indices of the ``size`` lowest ``draws`` of each class, in their order.

    Args:
        classes: ``[N]``.
        draws: ``[N]`` float.
        size: at most so many of a class.
    """
    kept = [
        members[np.argsort(draws[members], kind="stable")[:size]]
        for members in (np.flatnonzero(classes == label) for label in np.unique(classes))
    ]
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, int)


def in_two_dimensions(space: Space, method: str, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Lay out the points of a space in a plane.

    Args:
        space: N points, at least three.
        method: ``pca`` or ``tsne``.
        seed: of t-SNE.

    Returns:
        ``[N, 2]``, and the proxies' places ``[classes, 2]`` where the method has a place for them: PCA is a projection
        and shows them where they are, t-SNE has none for points that it did not lay out.
    """
    if method == "pca":
        pca = PCA(2, random_state=seed).fit(space.points)
        return pca.transform(space.points), None if space.proxies is None else pca.transform(space.proxies)
    perplexity = min(PERPLEXITY, (len(space.points) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(space.points), None


def tokens_figure(spaces: Sequence[Space], classes: np.ndarray, shown: Sequence[int], options: FigureOptions) -> Figure:
    """Rows: methods. Columns: spaces.

    Args:
        spaces: each with the same tokens.
        classes: ``[N]``, of the tokens.
        shown: labels in the order of colours.
        options: methods, seed and names.
    """
    num_rows = len(options.embedding)
    width = column_width(2)
    panel = min(width / len(spaces), 2.4)
    titles = [wrapped(space.title, panel) for space in spaces]
    in_legend = legend_columns([*(options.names[label] for label in shown), PROXY], width)
    lines_of_text = max(title.count("\n") for title in titles) + 1 + len(shown) // in_legend
    figure = new_figure(width, panel * num_rows + 0.25 + 0.14 * lines_of_text)
    grid = figure.subplots(num_rows, len(spaces), squeeze=False)
    colors = dict(zip(options.names, class_colors(len(options.names)), strict=True))
    markers = {label: MARKERS[i % len(MARKERS)] for i, label in enumerate(options.names)}
    for row, method in zip(grid, options.embedding, strict=True):
        row[0].set_ylabel(METHODS[method])
        for axes, space in zip(row, spaces, strict=True):
            points, proxies = in_two_dimensions(space, method, options.seed)
            _scatter(axes, points, classes, shown, colors, markers, options.seed)
            if proxies is not None:
                axes.scatter(
                    *proxies.T, s=70, marker="*", c=[colors[label] for label in shown], edgecolors="black",
                    linewidths=0.7, zorder=3,
                )  # fmt: skip
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    dots = {"linestyle": "", "markersize": 4}
    handles = [Line2D([], [], color=colors[k], marker=markers[k], label=options.names[k], **dots) for k in shown]
    if "pca" in options.embedding:
        star = {"marker": "*", "markersize": 8, "color": "white", "markeredgecolor": "black", "markeredgewidth": 0.7}
        handles.append(Line2D([], [], linestyle="", label=PROXY, **star))
    figure.legend(handles=handles, loc="outside lower center", ncols=in_legend)
    return figure


def _scatter(
    axes: Axes,
    points: np.ndarray,
    classes: np.ndarray,
    shown: Sequence[int],
    colors: Mapping[int, str],
    markers: Mapping[int, str],
    seed: int,
) -> None:
    """Points of all classes in mixed order, so that no class hides another."""
    order = np.random.default_rng(seed).permutation(len(points))
    for part in np.array_split(order, min(20, len(order))):
        for label in shown:
            mine = part[classes[part] == label]
            axes.scatter(
                *points[mine].T, s=5, marker=markers[label], c=colors[label], alpha=0.7, linewidths=0, rasterized=True
            )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)


def silhouettes(points: np.ndarray, classes: np.ndarray, shown: Sequence[int]) -> list[float]:
    """Mean silhouette of each class in the full space, from -1 (among others) to 1 (compact and apart)."""
    values = silhouette_samples(points, classes)
    return [float(values[classes == label].mean()) for label in shown]


def _caption(
    spaces: Sequence[Space],
    sample: ClassSample,
    classes: Sequence[int],
    runs: Sequence[TrainedRun],
    stride: Sequence[int],
    cases: Sequence[Case],
    options: FigureOptions,
) -> str:
    shown = np.isin(sample.classes, classes)
    by_space = [silhouettes(space.points, sample.classes[shown], classes) for space in spaces]
    rows = [["Class", "Tokens drawn", "of", *(f"silhouette, {space.title}" for space in spaces)]]
    for i, label in enumerate(classes):
        drawn = int((sample.classes == label).sum())
        values = [f"{means[i]:.3f}" for means in by_space]
        rows.append([options.names[label], str(drawn), str(sample.total[label]), *values])
    rows.append(["mean", "", "", *(f"{np.mean(means):.3f}" for means in by_space)])
    left_out = [name for label, name in options.names.items() if label not in classes]
    return "\n".join(
        [
            "**Foreground tokens in two dimensions.** Each point is a token, the mean over "
            f"{' x '.join(map(str, stride))} voxels; colour and shape are the class that most of its voxels have by "
            "the truth. Columns: the feature that the last layer of the network takes in, and SHTA's embedding z of "
            "it, scaled to unit length. Stars: the class proxies, scaled as well, at their place in the PCA; t-SNE has "
            "no place for them. The axes have no unit.",
            "",
            "Rule: of all tokens that are eligible by Eq. 7 (share of foreground and of the most frequent class; the "
            f"run's own thresholds), at most {TOKENS_PER_CLASS} of each class are drawn at random with seed "
            f"{options.seed}, the same ones in every column. PCA is fitted in each column to its points. t-SNE: "
            f"perplexity {PERPLEXITY} (less where there are few tokens), started from the PCA, same seed. Distances "
            "between groups mean nothing in t-SNE.",
            *(["", f"Without tokens, and not shown: {', '.join(left_out)}."] if left_out else []),
            "",
            "The silhouette (-1 to 1) says how compact and how far from the others a class is, in the full space.",
            "",
            *table(rows),
            "",
            f"From {cases_in_words(cases)}. Models:",
            "",
            *(f"- {run.name}: `{run.checkpoint_file}`" for run in runs),
        ]
    )
