"""One drawing function per figure, and the table, the line and the link that stand beneath each."""

import base64
import io
from collections.abc import Collection
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import HTML, Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sapcore.claims import DIRECTION, FAILS, HOLDS, OPEN, PLACES, VERDICTS
from sapcore.errors import SapcoreError
from sapcore.evaluation import difference
from sapcore.experiments import EPS_UNBOUNDED, READINGS
from sapcore.paths import write_atomically
from sapcore.provenance import machine
from sapcore.published import PUBLISHED, TABLE_1
from sapcore.rl.environments import GAMES
from sapcore.rl.playing import Moment, in_percent, relative_change

EPS_LABEL = "perturbation λ (pixel units, of 255)"


def _style() -> None:
    sns.set_theme(style="whitegrid", context="notebook", rc={"figure.dpi": 110, "savefig.dpi": 110})


def fig1a(frame: pd.DataFrame) -> Figure:
    """Accuracy of dense and SAP-k under random noise, against eps (Fig. 1a)."""
    return accuracy_against_eps(frame, "random noise of size λ")


def fig1b(frame: pd.DataFrame) -> Figure:
    """Accuracy of dense and SAP-k under FGSM, against eps (Fig. 1b), with the published numbers as diamonds."""
    return accuracy_against_eps(frame, "FGSM, each network its own adversary")


def fig1c(frame: pd.DataFrame) -> Figure:
    """Accuracy under the iterative attack, against eps (Fig. 1c); the legend says defender vs adversary."""
    return accuracy_against_eps(frame, "iterative attack")


def fig2(frame: pd.DataFrame, title: str) -> Figure:
    """Accuracy of dense and of networks with dropout under FGSM, against eps (Fig. 2a, 2b, 2c)."""
    return accuracy_against_eps(frame, title)


def equally_accurate(frame: pd.DataFrame, sap: pd.DataFrame) -> Markdown:
    """SAP-100 (from Fig. 1b) beside the rate of dropout that comes nearest to its accuracy without an attack."""
    sap = sap[sap["series"] == "SAP-100"]
    clean, rates = (part[part["eps"] == 0] for part in (sap, frame[frame["noisy"].astype(bool)]))
    if clean.empty or rates.empty:
        return Markdown("*The accuracies without an attack are not shown here.*")
    nearest = rates.loc[(rates["accuracy"] - clean["accuracy"].item()).abs().idxmin(), "series"]
    return accuracy_table(pd.concat([sap, frame[frame["series"] == nearest]]))


def fig3(frame: pd.DataFrame) -> Figure:
    """Accuracy of dense, SAP-100, ADV and ADV+SAP-100 under FGSM, against eps (Fig. 3)."""
    return accuracy_against_eps(frame, "FGSM, each network its own adversary")


def fig4(frame: pd.DataFrame) -> Figure:
    """Reliability diagrams, one panel per eps (Fig. 4), from `experiments.calibrations`.

    Above: accuracy against mean confidence of each bin that holds an image, faint where it holds fewer than ten; below:
    images per bin.
    """
    _style()
    grid = sorted(frame["eps"].unique())
    columns = max(1, min(len(grid), 4))
    bands = max(1, -(-len(grid) // columns))
    figure, axes = plt.subplots(
        2 * bands, columns, figsize=(2.6 * columns + 0.6, 4.2 * bands), height_ratios=[3, 1] * bands, squeeze=False,
        sharex=True, layout="constrained",
    )  # fmt: skip
    styles = _line_styles(list(frame["series"].unique()))
    for place in range(bands * columns):
        diagram, counts = (
            axes[2 * (place // columns)][place % columns],
            axes[2 * (place // columns) + 1][place % columns],
        )
        if place >= len(grid):
            diagram.axis("off")
            counts.axis("off")
            continue
        diagram.plot([0, 1], [0, 1], ":", color="grey")
        for name, style in styles.items():
            part = frame[(frame["eps"] == grid[place]) & (frame["series"] == name)]
            filled, few = part[part["images"] >= 10], part[(part["images"] > 0) & (part["images"] < 10)]
            diagram.plot(filled["confidence"], filled["accuracy"], label=name, **style | {"markersize": 3})
            faint = style | {"markersize": 3, "alpha": 0.35, "linestyle": "", "fillstyle": "none"}
            diagram.plot(few["confidence"], few["accuracy"], **faint)
            width = 1 / max(len(part), 1)
            counts.stairs(part["images"], np.arange(len(part) + 1) * width, color=style["color"], linewidth=1.4)
        diagram.set(title=f"λ = {grid[place]:g}", xlim=(0, 1), ylim=(-0.02, 1.02))
        counts.set(yscale="symlog", ylim=(0, None))
        if place % columns == 0:
            diagram.set_ylabel("accuracy in the bin")
            counts.set_ylabel("images")
        counts.set_xlabel("confidence")
        counts.tick_params(labelbottom=True)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(styles), frameon=False)
    return figure


def ece_table(frame: pd.DataFrame) -> Markdown:
    """The expected calibration error in percent with its bootstrap interval: a row per network, a column per eps."""
    return _with_intervals(frame, ("ece", "ece_low", "ece_high"), "calibration error (%) [95 % interval]")


def fig5(frame: pd.DataFrame, sap: pd.DataFrame) -> Figure:
    """Accuracy under FGSM, one panel per baseline, one curve per level (Fig. 5); SAP-100 (from Fig. 1b) dashed."""
    sap = sap[(sap["series"] == "SAP-100") & sap["eps"].isin(frame["eps"])]
    _style()
    panels = list(frame["panel"].unique())
    columns = max(1, min(len(panels), 3))
    bands = max(1, -(-len(panels) // columns))
    figure, axes = plt.subplots(
        bands, columns, figsize=(3.6 * columns, 3.6 * bands), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    grid = sorted(frame["eps"].unique())
    for panel, one in zip(panels, axes.flat, strict=False):
        part = frame[frame["panel"] == panel]
        _draw_curves(one, part, [grid.index(e) for e in part["eps"]])
        dashed = {"color": "darkorange", "linestyle": "--", "linewidth": 1.4}
        _draw_curves(one, sap, [grid.index(e) for e in sap["eps"]], {"SAP-100": dashed})
        one.set(title=panel, ylim=(-3, 103))
        one.set_xticks(range(len(grid)), [f"{e:g}" for e in grid])
        one.legend(fontsize="x-small", frameon=False)
    figure.supxlabel(EPS_LABEL)
    figure.supylabel("accuracy (%)")
    return figure


def fig6(frame: pd.DataFrame) -> Figure:
    """Accuracy of SAP-100 under FGSM, against eps, by what the adversary averages (Fig. 6)."""
    return accuracy_against_eps(frame, "SAP-100 under FGSM")


def accuracy_against(frame: pd.DataFrame, column: str, label: str, title: str) -> Figure:
    """One curve per series against a number such as `steps` or `gradients`, on a logarithmic axis."""
    _style()
    figure, axes = plt.subplots(figsize=(7, 4.4))
    _draw_curves(axes, frame, list(frame[column]))
    axes.set(title=title, xlabel=label, ylabel="accuracy (%)", ylim=(-3, 103), xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    if len(frame):
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    return figure


def _draw_curves(
    axes: Axes, frame: pd.DataFrame, at: list[float], styles: dict[str, dict[str, Any]] | None = None
) -> None:
    """Each series of the frame at these places, with its intervals."""
    placed = frame.assign(at=at)
    styles = _line_styles(list(frame["series"].unique())) if styles is None else styles
    for name, style in styles.items():
        part = placed[placed["series"] == name].sort_values("at")
        if part.empty:
            continue
        spread = [part["accuracy"] - part["low"], part["high"] - part["accuracy"]]
        axes.errorbar(
            part["at"], 100 * part["accuracy"], 100 * np.array(spread), label=name, capsize=2, elinewidth=1.2, **style
        )  # fmt: skip


def accuracy_against_eps(frame: pd.DataFrame, title: str) -> Figure:
    """One curve per series, at evenly spaced eps as in the paper; bars are 95 % Wilson intervals."""
    _style()
    grid = sorted(frame["eps"].unique())
    names = list(frame["series"].unique())
    figure, axes = plt.subplots(figsize=(7, 4.4))
    _draw_curves(axes, frame, [grid.index(e) for e in frame["eps"]])
    if frame.attrs.get("settings") is None or frame.attrs["settings"].dataset == "cifar10":
        _draw_published(axes, frame, grid)
    axes.set(title=title, xlabel=EPS_LABEL, ylabel="accuracy (%)", ylim=(-3, 103))
    axes.set_xticks(range(len(grid)), [f"{e:g}" for e in grid])
    if names:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.tight_layout()
    return figure


def _line_styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """Dense in black, the noisy series from light to dark; markers differ for readers who see no colour.

    Among many SAP-100 is the thick one.
    """
    noisy = [name for name in names if not name.startswith("dense")]
    colours = dict(zip(noisy, sns.color_palette("viridis_r", len(noisy)), strict=True))
    markers = "osv^Dphx"
    return {
        name: {
            "color": colours.get(name, "black"),
            "marker": markers[i % len(markers)],
            "markersize": 5,
            "linewidth": 3 if name == "SAP-100" and len(names) > 4 else 1.4,
        }
        for i, name in enumerate(names)
    }


def _draw_published(axes: Axes, frame: pd.DataFrame, grid: list[float]) -> None:
    points = [p for p in PUBLISHED if p.figure == frame.attrs["figure"] and not p.minus and p.eps in grid]
    for marker, series in zip("Ds", dict.fromkeys(p.series for p in points), strict=False):
        at, values = zip(*((grid.index(p.eps), 100 * p.value) for p in points if p.series == series), strict=True)
        axes.plot(at, values, marker, color="crimson", fillstyle="none", markersize=9, label=f"published, {series}")


def model_card(card: dict[str, Any]) -> Markdown:
    """A checkpoint's model card as a table."""
    recipe, origin = card["recipe"], card["provenance"][-1]
    sgd = (f"{recipe[name]:g}" for name in ("batch_size", "momentum", "weight_decay"))
    rows = {
        f"accuracy on all {card['test_images']:,} test images": f"{card['test_accuracy']:.2%}",
        "learning rate": ", then ".join(f"{rate:g} for {epochs} epochs" for epochs, rate in recipe["schedule"]),
        "batch size, momentum, weight decay": ", ".join(sgd),
        "time": f"{card['seconds'] / 60:.1f} minutes, {card['training_precision']}",
        "device": origin["device"],
        "commit, date": f"{origin['commit']}, {origin['date']}",
    }
    return Markdown(pd.DataFrame(rows.items(), columns=["checkpoint", card["name"]]).to_markdown(index=False))


def model_cards(cards: list[dict[str, Any]]) -> Markdown:
    """Several model cards as a table, a row each."""
    rows = []
    for card in cards:
        recipe, origin = card["recipe"], card["provenance"][-1]
        special = [f"dropout {recipe['dropout']:g}"] if recipe.get("dropout") else []
        if recipe.get("adversarial_share"):
            special.append(f"{recipe['adversarial_share']:.0%} FGSM at λ = {recipe['adversarial_eps']:g}")
        if recipe.get("crop"):
            special.append(f"crops of {recipe['crop']} × {recipe['crop']}")
        special += [name for way, name in (("wrap", "wrapped pixels"), ("jitter", "colour jitter")) if recipe.get(way)]
        special += [f"{recipe['devices']} devices"] if recipe.get("devices", 1) > 1 else []
        special += [recipe["note"]] if recipe.get("note") else []
        commit, *dirty = origin["commit"].split("-")  # in full it would have the table scroll
        rows.append({
            "checkpoint": card["name"],
            "trained with": ", ".join(special) or "–",
            "accuracy": f"{card['test_accuracy']:.2%} of {card['test_images']:,}",
            "learning rate (epochs)": ", ".join(f"{rate:g} ({epochs})" for epochs, rate in recipe["schedule"]),
            "minutes": f"{card['seconds'] / 60:.1f}",
            "device": origin["device"],
            "commit, date": f"{'-'.join([commit[:7], *dirty])}, {origin['date']}",
        })  # fmt: skip
    return Markdown(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def training_curve(card: dict[str, Any]) -> Figure:
    """Training loss and test accuracy against the epoch, from a model card."""
    _style()
    history = pd.DataFrame(card["history"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    left.plot(history["epoch"], history["loss"], color="black")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", yscale="log")
    tested = history.dropna(subset="test_accuracy")
    right.plot(tested["epoch"], 100 * tested["test_accuracy"], "o-", color="black")
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (left, right):
        for epoch in history["epoch"][history["lr"].diff() < 0]:
            axes.axvline(epoch - 0.5, color="grey", linestyle=":")
    figure.tight_layout()
    return figure


def attacked_images(rows: dict[str, Tensor]) -> Figure:
    """Rows of pictures: each tensor is (N, 3, H, W) in 0-255; N columns, a caption per row."""
    _style()
    columns = len(next(iter(rows.values())))
    figure, grid = plt.subplots(len(rows), columns, figsize=(1.1 * columns + 1.4, 1.15 * len(rows)), squeeze=False)
    for line, (caption, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.float().permute(1, 2, 0).div(255).clamp(0, 1).numpy())
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
        line[0].set_ylabel(caption, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.4)
    return figure


def mask_on_map(panels: dict[str, Tensor]) -> Figure:
    """One channel of an activation map in several states, (H, W) each, on one colour scale."""
    _style()
    top = max(float(panel.max()) for panel in panels.values())
    figure, row = plt.subplots(1, len(panels), figsize=(2.4 * len(panels), 2.4), squeeze=False, layout="constrained")
    for axes, (caption, panel) in zip(row[0], panels.items(), strict=True):
        picture = axes.imshow(panel.numpy(), vmin=0, vmax=top, cmap="magma")
        axes.set(title=caption, xticks=[], yticks=[])
        axes.grid(False)
    figure.colorbar(picture, ax=row[0].tolist(), fraction=0.02, pad=0.01, label="activation")
    return figure


def inclusion_law(p: Tensor, kept_share: Tensor, r: int, passes: int) -> Figure:
    """How often each unit was kept, against its p, with the law 1 - (1 - p)^r and its 95 % band over `passes`."""
    _style()
    figure, axes = plt.subplots(figsize=(6, 3.8))
    x = np.geomspace(float(p[p > 0].min()), float(p.max()), 200)
    law = -np.expm1(r * np.log1p(-x))
    band = 1.96 * np.sqrt(law * (1 - law) / passes)
    axes.plot(
        p.numpy(), 100 * kept_share.numpy(), ".", color="steelblue", markersize=3, label=f"kept in {passes} passes"
    )
    axes.fill_between(x, 100 * (law - band), 100 * (law + band), color="orange", alpha=0.4, label="95 % of units")
    axes.plot(x, 100 * law, color="black", label=r"$1-(1-p)^r$")
    axes.set(xscale="log", xlabel="p = |h| / Σ|h|", ylabel="passes in which the unit is kept (%)")
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def learning_curves(histories: dict[str, list[dict[str, Any]]], frame: pd.DataFrame) -> Figure:
    """Mean return of the episodes that ended in each ten thousand steps, and in a hundred thousand, one panel per game.

    histories: the `history` of each game's model card; frame: Table 1's, for the random policy's mean return, dashed.
    """
    figure, panels = _panels(list(histories))
    chance = frame[frame["series"] == "random"].set_index("panel")["mean"]
    for axes, (game, rows) in zip(panels, histories.items(), strict=False):
        curve = pd.DataFrame(rows).astype({"mean_return": float})
        step, ended = curve["step"] / 1e6, curve["episodes"].rolling(10, min_periods=1).sum()
        total = (curve["mean_return"].fillna(0) * curve["episodes"]).rolling(10, min_periods=1).sum()
        axes.plot(
            step, curve["mean_return"], ".-", color="C0", alpha=0.35, linewidth=1, markersize=3, label="10,000 steps"
        )
        axes.plot(step, total / ended.where(ended > 0), color="C0", label="100,000 steps")
        if game in chance.index:
            axes.axhline(chance[game], color="0.4", linestyle="--", label="at random")
        axes.set(title=game, xlabel="agent steps (millions)", ylabel="mean return")
        axes.set_ylim(bottom=0)
    if histories:
        _legend_above(figure, panels[0])
    return figure


def returns(frame: pd.DataFrame) -> Figure:
    """Mean return against eps of the agent and of the agent with SAP-100, one panel per game; dashed: at random."""
    games = list(frame["panel"].unique())
    figure, panels = _panels(games)
    grid = sorted(frame["eps"].unique())
    for axes, game in zip(panels, games, strict=False):
        part = frame[frame["panel"] == game]
        for i, name in enumerate(("dense", "SAP-100", "SAP-100 vs dense")):
            curve = part[part["series"] == name].sort_values("eps")
            if curve.empty:
                continue
            bars = [curve["mean"] - curve["low"], curve["high"] - curve["mean"]]
            places = np.array([grid.index(e) for e in curve["eps"]]) + 0.08 * i
            axes.errorbar(places, curve["mean"], yerr=bars, marker="o", capsize=3, label=name, color=f"C{i}")
        chance = part[part["series"] == "random"]
        if len(chance):
            axes.axhline(chance["mean"].item(), color="0.4", linestyle="--", label="at random")
            axes.axhspan(chance["low"].item(), chance["high"].item(), color="0.4", alpha=0.15, linewidth=0)
        axes.set_xticks(range(len(grid)), [f"{e:g}" for e in grid])
        axes.set(title=game, xlabel="perturbation λ (of 255)", ylabel="mean return")
        axes.set_ylim(bottom=min(0, part["low"].min()))
    if games:
        _legend_above(figure, *panels)
    return figure


def _legend_above(figure: Figure, *panels: Axes) -> None:
    """One legend for all panels, where it covers none."""
    shown = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=len(shown), frameon=False)


def _panels(names: list[str]) -> tuple[Figure, list[Axes]]:
    """A panel per name, three in a row."""
    _style()
    columns = max(1, min(len(names), 3))
    rows = max(1, -(-len(names) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(5, 3.6 * columns), 3.2 * rows), squeeze=False, layout="constrained"
    )
    for spare in axes.flat[max(1, len(names)) :]:
        spare.set_visible(False)
    return figure, list(axes.flat)


def returns_table(frame: pd.DataFrame) -> Markdown:
    """Mean returns with their bootstrap intervals: a row per game and player, a column per eps."""
    text = [f"{a:,.1f}" + ("" if np.isnan(low) else f" [{low:,.1f}, {high:,.1f}]") for a, low, high in
            zip(frame["mean"], frame["low"], frame["high"], strict=True)]  # fmt: skip
    rows = frame.assign(text=text, row=frame["panel"] + ", " + frame["series"])
    wide = rows.pivot(index="row", columns="eps", values="text").reindex(rows["row"].unique())
    wide.columns = [f"λ = {e:g}" for e in wide.columns]
    return Markdown(wide.fillna("").rename_axis("mean return [95 % interval]").to_markdown())


def better_than_chance(frame: pd.DataFrame) -> Markdown:
    """In which games the agent, not attacked, is clearly above a random policy: their intervals do not overlap."""
    clean = frame[frame["eps"] == 0]
    low = clean[clean["series"] == "dense"].set_index("panel")["low"]
    chance = clean[clean["series"] == "random"].set_index("panel")["high"]
    known = [game for game in frame["panel"].unique() if game in low.index and game in chance.index]
    above = [game for game in known if low[game] > chance[game]]
    rest = [game for game in known if game not in above]
    if not known:
        return Markdown("No agent's return without an attack is among these numbers.")
    said = f"Clearly better than a random policy without an attack: {', '.join(above) or 'none'}."
    return Markdown(said + (f" Not clearly: {', '.join(rest)}." if rest else ""))


def table1(frame: pd.DataFrame) -> Markdown:
    """The change of the mean return by SAP-100 relative to the agent without it, beside the published one (Table 1).

    All rows are there, also where ours are not computed; for SAP-100 attacked along dense's gradient there is one more.
    """
    found = frame.set_index(["panel", "series", "eps"])["returns"]
    rows: dict[str, dict[str, str]] = {}
    loose = []
    for e in sorted(frame.attrs["settings"].eps or TABLE_1):
        for series, label in (("SAP-100", "ours"), ("SAP-100 vs dense", "along dense's gradient")):
            if label == "ours" or e:
                rows[f"λ = {e:g}, {label}"] = {
                    game: in_percent(*relative_change(found[game, series, e], found[game, "dense", e]))
                    for game in frame["panel"].unique() if {(game, "dense", e), (game, series, e)} <= set(found.index)
                }  # fmt: skip
        published = TABLE_1.get(e, ())
        if len(published) == len(GAMES):
            rows[f"λ = {e:g}, published"] = {g: f"{100 * v:+.1f}" for g, v in zip(GAMES, published, strict=True)}
        elif published:
            loose.append(f"λ = {e:g}: " + ", ".join(f"{100 * v:+.1f}" for v in published))
    wide = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(frame["panel"].unique())).fillna("–")
    table = wide.rename_axis("change (%) [95 % interval]").to_markdown(disable_numparse=True)
    if "from 0" in table or "0 to 0" in table or "inf" in table:
        table += "\n\n*from 0*: the agent without SAP got nothing, the one with SAP something; *0 to 0*: both nothing; "
        table += "*inf*: so in more than 2.5 % of the resamples. The second table has the returns themselves."
    if loose:
        rest = "; ".join(loose)
        table += f"\n\nPublished too, with blanks whose games are not known, in the paper's order (%): {rest}."
    return Markdown(table)


def attacked_play(moments: list[Moment], actions: list[str]) -> Figure:
    """What happens, what is added and what the agent sees, and the values of its actions before (grey) and after.

    One column per moment; the frame is the newest of the four.
    """
    _style()
    figure, axes = plt.subplots(
        4, len(moments), figsize=(2.4 * len(moments), 8.6), squeeze=False, layout="constrained",
        height_ratios=[1, 1, 1, 1.2],
    )  # fmt: skip
    for number, (column, moment) in enumerate(zip(axes.T, moments, strict=True)):
        frame, shown = moment.seen[-1].float().numpy(), moment.shown[-1].numpy()
        reach = max(1.0, float(np.abs(shown - frame).max()))
        column[0].imshow(frame, cmap="gray", vmin=0, vmax=255)
        column[1].imshow(shown - frame, cmap="coolwarm", vmin=-reach, vmax=reach)
        column[2].imshow(shown, cmap="gray", vmin=0, vmax=255)
        column[0].set_title(f"step {moment.step}")
        for axes_ in column[:3]:
            axes_.set(xticks=[], yticks=[])
            axes_.grid(False)
        places = np.arange(len(actions))
        for values, color, shift in ((moment.before, "0.6", -0.2), (moment.after, "C3", 0.2)):
            best = int(values.argmax())
            edges = ["black" if i == best else color for i in places]
            column[3].barh(places + shift, values.numpy(), 0.4, color=color, edgecolor=edges)
        column[3].set_yticks(places, [""] * len(actions) if number else actions, fontsize=7)
        low = min(float(moment.before.min()), float(moment.after.min()))
        high = max(float(moment.before.max()), float(moment.after.max()))
        column[3].set_xlim(low - 0.2 * (high - low), high + 0.1 * (high - low))
        column[3].invert_yaxis()
        column[3].set_xlabel("value")
    for name, axes_ in zip(("frame", "perturbation", "seen"), axes[:3, 0], strict=True):
        axes_.set_ylabel(name)
    return figure


def film(plays: dict[str, list[Moment]], path: Path, scale: int = 2, milliseconds: int = 66) -> None:
    """A GIF of what several players see, side by side, under their names; as long as the shortest.

    Written whole or not at all; raises `SapcoreError` if it cannot be.
    """
    side = plays[next(iter(plays))][0].shown.shape[-1] * scale
    font = ImageFont.truetype(findfont("DejaVu Sans"), 10)  # matplotlib's own; Pillow's has no λ
    pages = []
    for moments in zip(*plays.values(), strict=False):
        page = Image.new("L", (len(plays) * side + 4 * (len(plays) - 1), side + 14), 255)
        for i, (name, moment) in enumerate(zip(plays, moments, strict=True)):
            picture = Image.fromarray(moment.shown[-1].round().to(torch.uint8).numpy())
            page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (i * (side + 4), 14))
            ImageDraw.Draw(page).text((i * (side + 4) + 2, 1), name, fill=0, font=font)
        pages.append(page)
    content = io.BytesIO()
    pages[0].save(content, "GIF", save_all=True, append_images=pages[1:], duration=milliseconds, loop=0, optimize=True)
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise SapcoreError(f"{path} cannot be written ({error.strerror or error}); name another file") from None


def benchmark_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The tables of one benchmark's rows, one after the other, with the device of each as a column."""
    parts = [pd.DataFrame(row["table"]).assign(device=machine(row["provenance"])) for row in rows]
    return pd.concat(parts, ignore_index=True)


def speeds(frame: pd.DataFrame, axis: str) -> Figure:
    """Dots on a logarithmic axis, a row of `frame` each: label, p20, p50, p80; upright where its `line` is true.

    A panel for each `device`, with its name where there are several.
    """
    _style()
    lines = frame["line"].astype(bool) if "line" in frame else pd.Series(False, index=frame.index)
    devices = list(frame["device"].unique())
    heights = [0.45 * ((frame["device"] == device) & ~lines).sum() + 1.8 for device in devices]
    figure, panels = plt.subplots(
        len(devices), 1, figsize=(7, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for device, axes in zip(devices, panels[:, 0], strict=True):
        here = frame["device"] == device
        dots = frame[here & ~lines]
        at = range(len(dots))
        middle = dots["p50"].to_numpy()
        spread = np.array([middle - dots["p20"].fillna(dots["p50"]), dots["p80"].fillna(dots["p50"]) - middle])
        axes.errorbar(middle, at, xerr=spread, linestyle="", marker="o", color="steelblue", ecolor="black", capsize=2)
        axes.set_ylim(-0.6, len(dots) - 0.4)
        for y, value in zip(at, middle, strict=True):
            axes.annotate(f"{value:.3g}", (value, y), xytext=(0, 5), textcoords="offset points", ha="center")
        upright = frame[here & lines]
        for style, line in zip(("-", "--", ":"), upright.itertuples(), strict=False):
            axes.axvline(line.p50, color="crimson", linestyle=style, label=line.label)
        axes.set(xscale="log", xlabel=axis, title=device if len(devices) > 1 else "")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.3, high * 1.3)  # the first and last numbers need room
        axes.set_yticks(at, dots["label"])
        axes.invert_yaxis()
    if lines.any():
        _legend_above(figure, *panels[:, 0])
    return figure


GROWING = {"images": "images", "passes": "passes for 16 images", "map side": "height × width of 64 maps"}
"""What grows in `benchmarks/scaling.py`, in words."""


def scaling_lines(frame: pd.DataFrame) -> Figure:
    """Seconds (bars: p20 to p80) and peak memory against what grows, as `benchmarks/scaling.py` lets it.

    Only memory begins at 0. A line for each `device`, with a legend where there are several.
    """
    _style()
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharey="row", layout="constrained")
    devices = list(frame["device"].unique())
    for column, (what, points) in zip(axes.T, frame.groupby("grows", sort=False), strict=True):
        for device, style in zip(devices, ("o-", "s--", "^:", "v-."), strict=False):
            part = points[points["device"] == device]
            number = part["number"] ** (2 if what == "map side" else 1)
            reach = np.abs(part[["p20", "p80"]].to_numpy(float).T - part["p50"].to_numpy())
            column[0].errorbar(number, part["p50"], reach, fmt=style, color="black", label=device)
            column[1].plot(number, part["peak MiB"], style, color="steelblue")
        for panel in column:
            panel.set(xscale="log")
        column[0].set(yscale="log")
        column[1].set(ylim=(0, 1.1 * frame["peak MiB"].max()))
        column[1].set_xlabel(GROWING[str(what)])
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory (MiB)")
    if len(devices) > 1:
        _legend_above(figure, axes[0, 0])
    return figure


def times_as_fast(times: dict[str, float], one: str, other: str) -> str:
    """By how many times, p20, p50 and p80, it is faster one way than the other; the other way round if that is more."""
    if times["p50"] < 1:
        return times_as_fast({f"p{100 - p}": 1 / times[f"p{p}"] for p in (20, 50, 80)}, other, one)
    return (
        f"{one[0].upper()}{one[1:]} it is **{times['p50']:.1f} times** as fast as {other} "
        f"({times['p20']:.1f} to {times['p80']:.1f})"
    )


def benchmark_origin(row: dict[str, Any]) -> Markdown:
    """One line: which benchmark, device, number of threads, versions and commit."""
    origin = row["provenance"]
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    return Markdown(
        f"*`benchmarks/{row['benchmark']}.py` on {row['dataset']}; {machine(origin)}, {origin['threads']} threads; "
        f"{versions}; commit {origin['commit']}, {origin['date']}.*"
    )


def accuracy_table(frame: pd.DataFrame, column: str = "eps") -> Markdown:
    """Accuracy in percent with its interval: a row per series, a column per eps, or per `steps` or `gradients`."""
    heading = "accuracy (%) [95 % interval]" + ("" if column == "eps" else f" after so many {column}")
    return _with_intervals(frame, ("accuracy", "low", "high"), heading, column)


def _with_intervals(frame: pd.DataFrame, names: tuple[str, str, str], heading: str, column: str = "eps") -> Markdown:
    """Three columns of the frame, a fraction and its interval, as percent: a row per series, a column per eps."""
    frame = frame.drop_duplicates(["series", column])  # dense may be in several panels
    numbers = (frame[name] for name in names)
    text = [f"{100 * a:.1f} [{100 * low:.1f}, {100 * high:.1f}]" for a, low, high in zip(*numbers, strict=True)]
    wide = frame.assign(text=text).pivot(index="series", columns=column, values="text")
    wide = wide.reindex(frame["series"].unique())
    wide.columns = [f"λ = {x:g}" if column == "eps" else f"{x:,}" for x in wide.columns]
    return Markdown(wide.fillna("–").rename_axis(heading).to_markdown())


def best_of_baselines(frame: pd.DataFrame, sap: pd.DataFrame) -> Markdown:
    """Per baseline and eps the best accuracy of its levels beside SAP-100's; bold where its interval reaches SAP's.

    frame: the figure's (Fig. 5); sap: rows of SAP-100 under FGSM. The best level may be another for each eps, which
    favours the baselines.
    """
    sap = sap[sap["series"] == "SAP-100"].set_index("eps")
    reached = dict(sap["low"])
    rows: dict[str, dict[Any, str]] = {"SAP-100": {e: f"{100 * a:.1f}" for e, a in sap["accuracy"].items()}}
    noisy = frame[frame["series"] != "dense"]
    for panel, part in noisy.groupby("panel", sort=False):
        best = part.loc[part.groupby("eps")["accuracy"].idxmax()].set_index("eps")
        rows[str(panel)] = {}
        for e, row in best.iterrows():
            text = f"{100 * row['accuracy']:.1f} ({row['level']:g})"
            rows[str(panel)][e] = f"**{text}**" if row["high"] >= reached.get(e, 2) else text
    wide = pd.DataFrame.from_dict(rows, orient="index").fillna("–")
    wide = wide[sorted(wide.columns)]
    wide.columns = [f"λ = {e:g}" for e in wide.columns]
    return Markdown(wide.rename_axis("accuracy (%) (level)").to_markdown(disable_numparse=True))


def readings(frame: pd.DataFrame) -> Figure:
    """Accuracy of dense and SAP-100 under FGSM by each reading of the paper, with the published numbers.

    A row of panels for the networks that were trained in full and, if there are any, one for those on a short schedule.
    """
    grid = sorted(frame["eps"].unique())
    lengths = [part for _, part in frame.groupby(frame["series"].map(_is_short))]
    columns = list(frame["panel"].unique())
    _style()
    size = 4 * max(1, len(columns)), 1.4 + 3.4 * max(1, len(lengths))
    figure, axes = plt.subplots(
        max(1, len(lengths)), max(1, len(columns)), figsize=size, squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(map(_without_length, _in_order(frame))))
    colours = ["black", *sns.color_palette("colorblind", max(0, len(names) - 1))][: len(names)]
    styles = {
        name: {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.3}
        for name, colour, marker in zip(names, colours, "osv^DPhX<>*"[: len(names)], strict=True)
    }
    for row, part in zip(axes, lengths, strict=False):  # of none one empty panel
        short = _is_short(part["series"].iloc[0])
        shown = part.assign(series=part["series"].map(_without_length))
        for place, panel in zip(row, columns, strict=True):
            curves = shown[shown["panel"] == panel]
            _draw_curves(place, curves, [grid.index(e) for e in curves["eps"]], styles)
            points = [p for p in PUBLISHED if (p.figure, p.series, p.minus) == ("fig1b", panel, "") and p.eps in grid]
            if points and frame.attrs["settings"].dataset == "cifar10":
                at, values = zip(*((grid.index(p.eps), 100 * p.value) for p in points), strict=True)
                place.plot(at, values, "D", color="crimson", fillstyle="none", markersize=9, label="published")
            place.set(title=f"{panel}, short training" if short else panel, ylabel="accuracy (%)", ylim=(-3, 103))
            place.set_xticks(range(len(grid)), [f"{e:g}" for e in grid])
    for place in axes[-1]:
        place.set_xlabel(EPS_LABEL)
    labels = (axes_.get_legend_handles_labels() for axes_ in axes.flat)
    found = {label: handle for pair in labels for handle, label in zip(*pair, strict=True)}
    known = {label: found[label] for label in (*names, "published") if label in found}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


SHORT = ", short training"


def _in_order(frame: pd.DataFrame) -> list[str]:
    """The readings that are there, as they are listed."""
    return [name for name in READINGS if name in set(frame["series"])]


def _is_short(reading: str) -> bool:
    """Whether the networks of a reading were trained on a shorter schedule than the book's."""
    return bool(READINGS[reading].trained)


def _without_length(reading: str) -> str:
    return reading.removesuffix(SHORT)


def readings_table(frame: pd.DataFrame) -> Markdown:
    """Each reading's numbers beside the published ones, its mean distance from them, and how much larger it is than the
    smallest.

    The intervals of the last two are of a parametric bootstrap: every number is drawn anew from its binomial law, once
    for all readings that share it. Bold: the closest of the networks trained alike, and those that are not clearly
    farther; how long a network was trained moves SAP's accuracy, too.
    """
    found = {(row["panel"], row["series"], row["eps"]): row for row in frame.to_dict(orient="records")}
    points = [p for p in PUBLISHED if p.figure == "fig1b"]
    heads = [f"SAP-100{' − dense' if p.minus else ''}, λ = {p.eps:g} (published {p.text})" for p in points]
    rng, draws = np.random.default_rng(0), {}

    def measured(panel: str, name: str, eps: float) -> tuple[tuple[float, float, float], NDArray[Any]]:
        """An accuracy with its interval, and itself as it might have come out as well, itself being the first."""
        row = found[panel, name, eps]
        # Without an attack all readings of a network are one cell.
        reading = READINGS[name]
        network = reading.trained, reading.everywhere, reading.noisy_statistics
        key = panel, name if eps else network, eps, row["accuracy"]
        if key not in draws:
            again = rng.binomial(row["images"], row["accuracy"], 20_000) / row["images"]
            draws[key] = np.append(row["accuracy"], again)
        return (row["accuracy"], row["low"], row["high"]), draws[key]

    rows: dict[str, list[str]] = {}
    distance: dict[str, NDArray[Any]] = {}
    for name in _in_order(frame):
        other = name if READINGS[name].changes_dense else "the paper's text" + SHORT * _is_short(name)
        needed = {("SAP-100", name, p.eps) for p in points} | {("dense", other, p.eps) for p in points if p.minus}
        if not needed <= found.keys():
            continue
        texts, gaps = [], []
        for p in points:
            ours, drawn = measured("SAP-100", name, p.eps)
            if p.minus:
                dense, drawn_of_dense = measured("dense", other, p.eps)
                ours, drawn = difference(ours, dense), drawn - drawn_of_dense
            texts.append("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in ours)))
            gaps.append(100 * np.abs(drawn - p.value))
        distance[name] = np.mean(gaps, axis=0)
        rows[name] = [*texts, "{:.1f} [{:.1f}, {:.1f}]".format(*_with_interval(distance[name]))]
    if frame.attrs["settings"].dataset != "cifar10" or not rows:
        return Markdown(
            "*The published numbers are for CIFAR-10 at λ = 0, 1 and 4, and not all of these are shown here.*"
        )
    short = {name: _is_short(name) for name in rows}
    closest = {
        length: min((name for name in rows if short[name] == length), key=lambda name: float(distance[name][0]))
        for length in set(short.values())
    }
    shown = {}
    for name, row in sorted(rows.items(), key=lambda item: short[item[0]]):
        nearest = closest[short[name]]
        more, low, high = _with_interval(distance[name] - distance[nearest])
        said = "the closest" if name == nearest else f"{more:+.1f} [{low:+.1f}, {high:+.1f}]"
        label = _without_length(name) + SHORT * short[name]
        shown[f"**{label}**" if low <= 0 else label] = [*row, said]
    columns = [*heads, "mean distance (points)", "farther than the closest (points)"]
    table = pd.DataFrame.from_dict(shown, orient="index", columns=columns)
    return Markdown(table.rename_axis("accuracy (%) [interval]").to_markdown(disable_numparse=True))


def _with_interval(values: NDArray[Any]) -> tuple[float, float, float]:
    """The first of them, and where 95 % of the others lie."""
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return float(values[0]), float(low), float(high)


def ladder(frame: pd.DataFrame) -> Figure:
    """Accuracy under each attack of the ladder, one panel per defence, one colour per eps; weak attacks above.

    Of two eps that are nearly the same the first is drawn alone.
    """
    most = max((part["series"].unique() for _, part in frame.groupby("panel")), key=len, default=())
    rungs = [name for name in dict.fromkeys([*most, *frame["series"]]) if name != "no attack"]
    eps = sorted(e for e in frame["eps"].unique() if e)
    eps = [e for i, e in enumerate(eps) if i == 0 or e > 1.1 * eps[i - 1]]
    names = list(frame["panel"].unique())
    _style()
    columns = min(2, max(1, len(names)))
    lines = max(1, -(-len(names) // columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(3 + 3 * columns, (0.3 * len(rungs) + 1.1) * lines + 0.4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for spare in axes.flat[len(names) or 1 :]:
        spare.set_visible(False)
    colours = dict(zip(eps, sns.color_palette("viridis_r", len(eps)), strict=True))
    markers = dict(zip(eps, "osv^Dphx", strict=False))
    for one, panel in zip(axes.flat, names, strict=False):
        part = frame[frame["panel"] == panel]
        for _, row in part[part["eps"] == 0].iterrows():
            one.axvline(100 * row["accuracy"], color="black", linestyle=":", label="no attack")
        for i, e in enumerate(eps):
            rows = part[(part["eps"] == e) & part["series"].isin(rungs)]
            at = [rungs.index(name) + 0.12 * (i - (len(eps) - 1) / 2) for name in rows["series"]]
            spread = [rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]
            one.errorbar(
                100 * rows["accuracy"], at, xerr=100 * np.array(spread), linestyle="", marker=markers.get(e, "o"),
                markersize=4, elinewidth=0.8, color=colours[e], label=f"λ = {e:g}",
            )  # fmt: skip
        one.set(title=panel, xlim=(-3, 103), xlabel="accuracy (%)")
        one.set_yticks(range(len(rungs)), rungs)
        one.set_ylim(len(rungs) - 0.4, -0.6)
    if names:
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def ladder_budget(frame: pd.DataFrame) -> Figure:
    """Accuracy against what an attack costs per image, gradients or queries, one panel per bounded eps."""
    part = frame[(frame["eps"] > 0) & (frame["eps"] < EPS_UNBOUNDED) & (frame["gradients"] > 0)]
    names = list(part["series"].unique())
    grid = sorted(part["eps"].unique())
    figure, panels = _panels([f"λ = {e:g}" for e in grid])
    colours = dict(zip(names, sns.color_palette("husl", len(names)), strict=True))
    for one, e in zip(panels, grid, strict=False):
        for i, name in enumerate(names):
            rows = part[(part["eps"] == e) & (part["series"] == name)]
            spread = 100 * np.array([rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]])
            one.errorbar(
                rows["gradients"], 100 * rows["accuracy"], spread, linestyle="", marker="os^vDPX*hp<>d8"[i % 14],
                color=colours[name], label=name, markersize=6, elinewidth=0.8,
            )  # fmt: skip
        one.set(title=f"λ = {e:g}", xscale="log", ylim=(-3, 103), ylabel="accuracy (%)")
        one.set_xlabel("gradients or queries per image")
    if names:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(names) // 3))
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def ladder_table(frame: pd.DataFrame) -> Markdown:
    """Accuracy under each attack of the ladder with its interval: one defence, a column per eps, and the budget."""
    text = [f"{100 * a:.1f} [{100 * low:.1f}, {100 * high:.1f}]" for a, low, high in
            zip(frame["accuracy"], frame["low"], frame["high"], strict=True)]  # fmt: skip
    rows = frame.assign(text=text)
    wide = rows.pivot(index="series", columns="eps", values="text").reindex(rows["series"].unique())
    wide.columns = [f"λ = {e:g}" for e in wide.columns]
    wide.insert(0, "gradients or queries", rows.groupby("series", sort=False)["gradients"].max().map("{:,}".format))
    return Markdown(wide.fillna("–").rename_axis("accuracy (%) [95 % interval]").to_markdown(disable_numparse=True))


def strongest_table(found: pd.DataFrame, lacking: Collection[tuple[str, float]] = ()) -> Markdown:
    """`adaptive.strongest`: the number that counts, beside what two other ways of counting would claim.

    Cost is gradients or queries for one image.
    lacking: defence and eps of the attacks and checks that are not computed; there an attack is strongest *so far*.
    """
    rows, order = [], list(dict.fromkeys(found["panel"]))
    for row in found.sort_values("panel", key=lambda panel: panel.map(order.index), kind="stable").to_dict("records"):
        single, every = (
            f"{100 * row[name]:.1f}" if row["noisy"] else "–" for name in ("single_pass", "every_pass")
        )  # fmt: skip
        rows.append({
            "defence": row["panel"],
            "λ": f"{row['eps']:g}",
            "strongest attack": row["series"] + ", so far" * ((row["panel"], row["eps"]) in lacking),
            "accuracy of the mean output (%)": f"{100 * row['accuracy']:.1f} "
            f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
            "accuracy of one random pass (%)": single,
            "right in all passes (%)": every,
            "cost": f"{row['gradients']:,}",
        })  # fmt: skip
    return Markdown(pd.DataFrame(rows).fillna("–").to_markdown(index=False, disable_numparse=True))


def differences(found: pd.DataFrame, pairs: dict[str, str]) -> Markdown:
    """By how many points each defence of `adaptive.strongest` is above the one that it is paired with, for each eps."""
    grid, rows = sorted(found["eps"].unique()), []
    for defence, other in pairs.items():
        row = {"points [95 % interval]": f"{defence} above {other}"}
        for e in grid:
            ours, theirs = (
                [tuple(r) for r in part[["accuracy", "low", "high"]].itertuples(index=False)]
                for part in (found[(found["panel"] == name) & (found["eps"] == e)] for name in (defence, other))
            )
            if ours and theirs:
                row[f"λ = {e:g}"] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in difference(*ours, *theirs)))
        rows.append(row)
    return Markdown(pd.DataFrame(rows).fillna("–").to_markdown(index=False, disable_numparse=True))


def checks_table(found: pd.DataFrame) -> Markdown:
    """The verdicts of `adaptive.checks`: a row per check, a column per defence; what failed is bold."""
    shown = found.assign(verdict=found["verdict"].replace("fail", "**fail**"))
    wide = shown.pivot(index="check", columns="panel", values="verdict")
    wide = wide.loc[list(dict.fromkeys(found["check"])), list(dict.fromkeys(found["panel"]))]
    return Markdown(wide.fillna("–").rename_axis(columns=None).to_markdown(disable_numparse=True))


def checks_numbers(found: pd.DataFrame) -> HTML:
    """The numbers behind `checks_table`, to be unfolded."""
    items = "".join(
        f"<li><strong>{escape(row['panel'])}</strong>: {escape(row['check'])} <em>{escape(row['verdict'])}</em>"
        f"<br><small>{escape(row['why'])}</small></li>"
        for row in found[found["why"] != ""].to_dict(orient="records")
    )
    return HTML(f'<details class="verdicts"><summary>The numbers behind each</summary><ul>{items}</ul></details>')


def verdict_lists(card: pd.DataFrame) -> HTML:
    """The sentences of `claims.scorecard` under their verdicts, to be unfolded, each a link to its numbers' figure.

    The paper's own claims first, then those of others about it.
    """
    parts = []
    for later, whose in ((False, "the paper's claims"), (True, "later claims about SAP")):
        for verdict in VERDICTS:
            rows = card[(card["verdict"] == verdict) & (card["later"] == later)].to_dict(orient="records")
            if rows:
                items = "".join(f"<li>{_link(row)} <small>({escape(row['place'])})</small></li>" for row in rows)
                parts.append(
                    f'<details class="verdicts"><summary><strong>{len(rows)}</strong> of {whose} '
                    f"<strong>{escape(verdict_on(len(rows), verdict))}</strong></summary><ul>{items}</ul></details>"
                )
    return HTML("".join(parts))


def verdict_on(count: int, verdict: str) -> str:
    """A verdict as the verb of so many claims."""
    return verdict if count == 1 else VERDICT_OF_MANY[verdict]


def _link(row: dict[Any, Any]) -> str:
    """A claim's sentence, which leads to where its numbers are drawn."""
    chapter, anchor = PLACES[row["figure"]]
    return f'<a href="{chapter}.html#{anchor}">{escape(row["sentence"])}</a>'


VERDICT_OF_MANY = {
    HOLDS: "hold",
    DIRECTION: "hold in direction",
    FAILS: "do not hold",
    OPEN: "cannot be judged",
}
"""The verdicts on several claims."""


def scorecard(card: pd.DataFrame) -> HTML:
    """The claims of `claims.scorecard`, each with its verdict, its numbers and a link to where they are drawn."""
    rows = []
    for row in card.to_dict(orient="records"):
        published = f"; published: {row['published']}" if row["published"] else ""
        rows.append(
            f"<tr><td><strong>{escape(row['verdict'])}</strong></td>"
            f"<td>{_link(row)} ({escape(row['place'])})"
            f"<br><small>{escape(row['why'] + published)}. "
            f"<em>Rule, set {escape(row['written'])}: {escape(row['rule'])}</em></small></td></tr>"
        )
    return HTML(
        '<table class="table scorecard"><thead><tr><th>verdict</th><th>claim</th></tr></thead><tbody>'
        + "".join(rows) + "</tbody></table>"
    )  # fmt: skip


def published_table(frame: pd.DataFrame) -> Markdown:
    """Our numbers beside the published ones, for the points that have both."""
    found = frame.drop_duplicates(["series", "eps"]).set_index(["series", "eps"])["accuracy"]
    rows = []
    for p in PUBLISHED:
        needed = [(name, p.eps) for name in (p.series, p.minus) if name]
        if p.figure != frame.attrs["figure"] or any(point not in found.index for point in needed):
            continue
        ours = found[needed[0]] - (found[needed[1]] if p.minus else 0)
        what = f"{p.series} minus {p.minus}, λ = {p.eps:g} (points)" if p.minus else f"{p.series}, λ = {p.eps:g} (%)"
        rows.append((what, p.text, f"{100 * ours:+.1f}" if p.minus else f"{100 * ours:.1f}", p.source))
    if frame.attrs["settings"].dataset != "cifar10" or not rows:
        return Markdown("*The published numbers are for CIFAR-10, and none is for the points shown here.*")
    return Markdown(
        pd.DataFrame(rows, columns=["accuracy", "published", "ours", "source"]).to_markdown(
            index=False, disable_numparse=True
        )
    )


def origin(frame: pd.DataFrame) -> Markdown:
    """One line: how many images and passes, which device, which commit, and what is not computed yet."""
    line = []
    what = "images" if "images" in frame else "episodes"
    for noisy, part in frame.groupby("noisy", sort=True):
        images, passes = (_range(part[name]) for name in (what, "passes"))
        gradients = part["gradient_passes"][part["gradient_passes"] > 0]
        more = f", {_range(gradients)} per gradient" if noisy and len(gradients) else ""
        many = "es" * (passes != "1")
        line.append(f"{'noisy' if noisy else 'deterministic'}: {images} {what}, {passes} pass{many} per output{more}")
    devices, commits = (", ".join(sorted(set(frame[name]))) for name in ("device", "commit"))
    missing = frame.attrs["missing"]
    figure = frame.attrs["figure"]
    waiting = frame.attrs.get("waiting", 0)
    of = sorted({panel for panel, _ in frame.attrs.get("lacking", ()) if panel})
    cells = f"{len(missing)} of the cells" + (f" (some of {', '.join(of)})" if of else "")
    gap = f" **Not computed yet: {cells}; `sapcore run {figure}` computes them" if missing else ""
    gap += f", {'all' if waiting == len(missing) else waiting} once `sapcore train` has made their networks" * (
        waiting > 0
    ) + ".**" * (gap != "")
    where = f"device: {devices}; commit: {commits}" if len(frame) else "nothing stored"
    return Markdown(f"*{figure}, {_subject(frame)}; {'; '.join([*line, where])}.*{gap}")


def _subject(frame: pd.DataFrame) -> str:
    """What a frame's numbers were measured on."""
    return str(frame.attrs["settings"].dataset) if "images" in frame else "Atari"


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,.0f}" if low == high else f"{low:,.0f}–{high:,.0f}"


def csv_link(frame: pd.DataFrame) -> HTML:
    """A link that downloads the figure's numbers as CSV; it carries them, so it works in any copy of the page."""
    frame = frame if frame.get("panel", pd.Series()).any() else frame.drop(columns="panel", errors="ignore")
    content = base64.b64encode(frame.to_csv(index=False).encode()).decode()
    name = f"{frame.attrs['figure']}-{_subject(frame)}.csv"
    return HTML(f'<a download="{name}" href="data:text/csv;base64,{content}">The numbers of this figure as CSV</a>')
