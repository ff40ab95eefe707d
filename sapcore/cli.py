"""The command line: `sapcore data`, `train`, `film`, `run`, `show`, `status`, `verify`, `claims`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sapcore import checkpoints, claims, data, experiments, provenance, results, runner, training
from sapcore.errors import SapcoreError
from sapcore.paths import ROOT, STATE, data_root
from sapcore.rl import double_dqn, environments, playing
from sapcore.sap import with_sap

BOOKS_FILM = 2, 150, 0
"""The λ, the agent steps and the seed of the films in the book."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 something failed, 2 bad input, 130 stopped by Ctrl-C."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except SapcoreError as error:
        print(f"sapcore: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nsapcore: stopped; what is finished is stored, and the same command goes on from there", file=sys.stderr
        )
        return 130
    except BrokenPipeError:  # what reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sapcore", description="Replicate Stochastic Activation Pruning.")
    commands = parser.add_subparsers(required=True, metavar="command")

    add = commands.add_parser("data", help="check or download CIFAR-10", description=_data.__doc__)
    add.set_defaults(command=_data)

    add = commands.add_parser("train", help="train a network, or go on with it", description=_train.__doc__)
    add.add_argument("name", help=f"one of {', '.join((*training.RECIPES, *double_dqn.RECIPES))}")
    add.add_argument("--device", help="cpu, cuda or cuda:N (default: CUDA where there is one)")
    add.add_argument("--again", action="store_true", help="even if a network by this recipe is at hand")
    add.set_defaults(command=_train)

    add = commands.add_parser("film", help="film an attacked episode", description=_film.__doc__)
    add.add_argument("game", help=f"one of {', '.join(environments.GAMES)}")
    add.add_argument("--eps", type=float, default=BOOKS_FILM[0], help="perturbation in pixel units, 0-255")
    add.add_argument("--steps", type=int, default=BOOKS_FILM[1], help="agent steps, a picture each")
    add.add_argument("--out", type=Path, metavar="FILE.gif", help="default, of the book's film alone: where it has it")
    add.add_argument("--seed", type=int, default=BOOKS_FILM[2])
    add.set_defaults(command=_film)

    add = commands.add_parser("claims", help="judge the paper's claims", description=_claims.__doc__)
    add.add_argument("--json", action="store_true", help="print everything as JSON")
    add.set_defaults(command=_claims)

    for name, command, text in (
        ("run", _run, "compute the cells that are missing"),
        ("show", _show, "print the numbers in the store"),
        ("status", _status, "list the cells: wanted, present, stale"),
        ("verify", _verify, "compute stored cells again and compare"),
    ):
        add = commands.add_parser(name, help=text, description=command.__doc__)
        add.add_argument("figures", nargs="*", metavar="FIGURE", help=f"{', '.join(experiments.FIGURES)}; default all")
        add.add_argument("--dataset", default="cifar10", help=" or ".join(data.DATASETS))
        add.add_argument("--eps", type=float, nargs="+", help="perturbations in pixel units, 0-255")
        add.add_argument("--examples", type=int, help="test images per cell")
        add.add_argument("--passes", type=int, help="Monte Carlo passes of gradient and output")
        add.add_argument("--game", help=f"{', '.join(environments.GAMES)}; of Table 1, default all")
        add.add_argument("--episodes", type=int, help="episodes per cell of Table 1")
        add.add_argument("--seed", type=int, default=0)
        if name in ("run", "verify"):
            add.add_argument("--device", help="cpu, cuda or cuda:N (default: CUDA where there is one)")
        if name == "run":
            where = add.add_mutually_exclusive_group()
            where.add_argument("--workers", type=int, default=0, metavar="N", help="share the cells among N processes")
            where.add_argument("--scheduler", default="", metavar="tcp://HOST:PORT", help="of a Dask cluster")
        elif name == "verify":
            add.add_argument("--sample", type=int, metavar="N", help="N cells at random; default all")
            add.add_argument("--draw", type=int, default=0, metavar="SEED", help="which N: another number, other cells")
        elif name == "status":
            add.add_argument("--json", action="store_true", help="print every cell as JSON")
        add.set_defaults(command=command)
    return parser


def _data(_: argparse.Namespace) -> int:
    """Check that CIFAR-10 is on disk with torchvision's checksums; download it if it is not."""
    for split in data.SPLITS:
        images, _labels = data.load("cifar10", split)
        print(f"cifar10 {split}: {len(images)} images under {data_root()}")
    return 0


def _train(parsed: argparse.Namespace) -> int:
    """Train a network or an agent by its recipe. Can be stopped at any moment and goes on from its last state."""
    name, recipes = parsed.name, {**training.RECIPES, **double_dqn.RECIPES}
    if name not in recipes:
        raise SapcoreError(f"no recipe is named {name!r}; there are {', '.join(recipes)}")
    provenance.device(parsed.device)
    begun = any(path.exists() for path in (STATE / f"{name}.safetensors", STATE / name / "state.safetensors"))
    if checkpoints.is_by(name, recipes[name]) and not begun and not parsed.again:
        print(f"{name} is trained by this recipe already; --again trains it anew")
        return 0
    agent = name in double_dqn.RECIPES
    (double_dqn if agent else training).train(name, device=parsed.device)
    card = checkpoints.card(name)
    if agent:
        print(f"{name}: mean return {card['mean_return_at_the_end']:g} at the end")
    else:
        print(f"{name}: {card['test_accuracy']:.2%} of the test images are right")
    return 0


def _film(parsed: argparse.Namespace) -> int:
    """Film an agent under FGSM, with and without SAP-100, and neither.

    Without other eps, steps and seed it is the book's film, and goes to book/_static/GAME.gif if --out names no file.
    """
    from sapcore import figures  # here, because drawing takes seconds to import

    if parsed.steps < 1:
        raise SapcoreError(f"steps is {parsed.steps}, but must be a whole number of 1 or more")
    environments.check_game(parsed.game)
    if parsed.out and parsed.out.suffix.lower() != ".gif":
        raise SapcoreError(f"a film is a GIF, but --out is {parsed.out}: its name must end in .gif")
    if not parsed.out and (parsed.eps, parsed.steps, parsed.seed) != BOOKS_FILM:
        raise SapcoreError("a film of other eps, steps or seed is not the book's: say with --out where it is to go")
    path = parsed.out or ROOT / "book" / "_static" / f"{parsed.game}.gif"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before minutes of play, not after
    except OSError as error:
        raise SapcoreError(f"{path.parent} cannot be made ({error.strerror or error}); name another --out") from None
    agent = checkpoints.load(f"double-dqn-{parsed.game}")
    noisy = with_sap(agent, experiments.SAP_100.level or 0)
    plays = {
        name: playing.moments(network, parsed.game, parsed.steps, eps=eps, seed=parsed.seed)
        for name, network, eps in (
            ("not attacked", agent, 0), (f"attacked, λ = {parsed.eps:g}", agent, parsed.eps),
            (f"SAP-100, attacked, λ = {parsed.eps:g}", noisy, parsed.eps),
        )
    }  # fmt: skip
    figures.film(plays, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _run(parsed: argparse.Namespace) -> int:
    """Compute the missing cells of the figures. Can be stopped at any moment; finished cells are kept."""
    if parsed.workers < 0:
        raise SapcoreError(f"workers is {parsed.workers}, but must be a whole number of 1 or more")
    listed = _listed(parsed)
    wanted: dict[tuple[str, ...], dict[results.Cell, None]] = {}
    for figure, cells in listed.items():
        computable = [cell for cell in cells if cell.computable]
        wanted.setdefault(experiments.ALSO.get(figure, ()), {}).update(dict.fromkeys(computable))
    failed = []
    for also, cells_of in wanted.items():
        failed += runner.run(
            list(cells_of), parsed.device, workers=parsed.workers, scheduler=parsed.scheduler, also=also
        )
    untrained = dict.fromkeys(cell.checkpoint for cells in listed.values() for cell in cells if not cell.computable)
    for name in untrained:
        print(f"sapcore: {name} is left out: `sapcore train {name}` trains it", file=sys.stderr)
    _show(parsed)
    return 1 if failed or untrained else 0


def _show(parsed: argparse.Namespace) -> int:
    """Print the stored numbers of the figures with their 95 % intervals, and compute nothing: accuracies in percent,
    calibration errors in percent (fig4), returns (table1)."""
    for figure in _figures(parsed):
        s = _settings(parsed)
        frame = experiments.stored(figure, s)
        lacking = len(frame.attrs["missing"])
        wanted = len(experiments.cells(figure, s))
        print(f"\n{figure}" + (f" (not in the store: {lacking} of {wanted} cells)" if lacking else ""))
        if figure == "fig4":
            frame = experiments.stored_calibrations(s).drop_duplicates(["series", "eps"]).assign(panel="")
            frame = frame.rename(columns={"ece_low": "low", "ece_high": "high"})
        if len(frame):
            print(_in_columns(figure, frame))
    return 0


def _in_columns(figure: str, frame: pd.DataFrame) -> str:
    name, unit = {"table1": ("mean", 1), "fig4": ("ece", 100)}.get(figure, ("accuracy", 100))
    column = {"fig1c_steps": "steps", "fig6_budget": "gradients"}.get(figure, "eps")
    ends = (unit * frame[["low", "high"]]).itertuples(index=False)
    texts = [f"{unit * x:.1f} [{low:.1f}, {high:.1f}]" for x, (low, high) in zip(frame[name], ends, strict=True)]
    wide = frame.assign(text=texts).pivot_table("text", ["panel", "series"], column, aggfunc="first", sort=False)
    wide = wide.sort_index(axis=1).fillna("")
    if wide.index.names[0] == "panel" and not any(wide.index.get_level_values("panel")):
        wide = wide.droplevel("panel")
    return str(wide.to_string())


def _status(parsed: argparse.Namespace) -> int:
    """Count each figure's cells: wanted, present, stale, damaged, missing. The exit code is 1 if any is not present."""
    listed = _listed(parsed)
    report = {
        figure: [
            {"cell": cell.label, "key": cell.key, "state": found, "why": why, "spec": cell.spec}
            for cell in cells
            for found, why in [results.state(cell, experiments.ALSO.get(figure, ()))]
        ]
        for figure, cells in listed.items()
    }
    if parsed.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{'figure':16}{'wanted':>8}{'present':>9}{'stale':>7}{'damaged':>9}{'missing':>9}")
        for figure, rows in report.items():
            count = {
                name: sum(row["state"] == name for row in rows) for name in ("present", "stale", "damaged", "missing")
            }
            print(
                f"{figure:16}{len(rows):8}{count['present']:9}{count['stale']:7}{count['damaged']:9}{count['missing']:9}"
            )
            for row in rows:
                if row["why"]:
                    print(f"  {row['cell']}: {row['state']}, {row['why']}")
    present = all(row["state"] == "present" for rows in report.values() for row in rows)
    return 0 if present else 1


def _verify(parsed: argparse.Namespace) -> int:
    """Compute cells of the store again: the same on the same device and versions, within their interval elsewhere."""
    listed = _listed(parsed)
    stored = [c for c in dict.fromkeys(c for cells in listed.values() for c in cells) if results.read(c) is not None]
    if not stored:
        raise SapcoreError("nothing of this is in the store yet; `sapcore run` computes it")
    differing = 0
    for check in runner.verify(stored, parsed.sample, parsed.draw, parsed.device):
        differing += not check.same
        print(f"{'same' if check.same else 'DIFFERENT':10}{check.cell.label}: {check.reason}", flush=True)
    return 1 if differing else 0


def _claims(parsed: argparse.Namespace) -> int:
    """Judge every claim of the paper by the numbers in the store, each by its own rule."""
    card = claims.scorecard()
    if parsed.json:
        print(json.dumps(card.to_dict(orient="records"), indent=2, ensure_ascii=False))
        return 0
    for row in card.to_dict(orient="records"):
        print(f"{row['verdict']:20}{row['place']}: {row['sentence']}")
        print(f"{'':20}{row['why']}" + (f"; published: {row['published']}" if row["published"] else ""))
    print(", ".join(f"{verdict}: {count}" for verdict, count in claims.counts(card).items()))
    return 0


def _settings(parsed: argparse.Namespace) -> experiments.Settings:
    return experiments.settings(
        parsed.dataset, parsed.eps, parsed.examples, parsed.passes, parsed.seed,
        game=parsed.game, episodes=parsed.episodes,
    )  # fmt: skip


def _listed(parsed: argparse.Namespace) -> dict[str, list[results.Cell]]:
    """The cells of each figure."""
    return {figure: experiments.cells(figure, _settings(parsed)) for figure in _figures(parsed)}


def _figures(parsed: argparse.Namespace) -> Sequence[str]:
    """Those asked for, or all."""
    others = set(experiments.FIGURES) - {"table1"}  # an unknown figure has a sentence of its own
    if parsed.figures and others >= set(parsed.figures) and (parsed.game, parsed.episodes) != (None, None):
        raise SapcoreError(f"--game and --episodes are of table1, but only {', '.join(parsed.figures)} are asked for")
    if parsed.figures == ["table1"] and (parsed.examples, parsed.dataset) != (None, "cifar10"):
        raise SapcoreError("--examples and --dataset are of figures on images, but only table1, on games, is asked for")
    return parsed.figures or list(experiments.FIGURES)


if __name__ == "__main__":
    sys.exit(main())
