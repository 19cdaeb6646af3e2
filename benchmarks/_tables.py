"""The tables of the fidelity benchmark, as Markdown, and its plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import _plot

_SHOWN = 8


def text(results: dict[str, Any]) -> str:
    """Return the tables of what is there of one model."""
    subject = results["subject"]
    lines = [
        f"# {subject['model']}, {subject['dtype']}, {results['count']} samples of "
        f"{subject['captions']}",
        "",
    ]
    if results["methods"]:
        lines += [*_methods(results), ""]
    if results["truth"]:
        spent = [entry["seconds"] for entry in results["truth"].values()]
        lines += [f"True KL of all groups: {sum(spent):.1f} s for {len(spent)} pairs.", ""]
    if results["cost"]:
        lines += [*_cost(results["cost"]), ""]
    recipes = dict(results["recipes"] or {})
    floor = recipes.pop("floor", None)
    for title, entries in recipes.items():
        lines += [*_recipes(title, entries), ""]
    if floor is not None:
        lines += [
            f"Rounding to {subject['dtype']} costs the unquantized model {floor:.1e} nats a token, "
            "held out.",
            "",
        ]
    return "\n".join(lines)


def drawn(results: dict[str, Any]) -> str:
    """Return a plot of the estimates at 8 draws, or the most that were taken, by pair."""
    draws = _draws(results)
    shown = _SHOWN if _SHOWN in draws else max(draws)
    nats, truth = results["methods"][f"fisher, {shown}"], results["truth"]
    return _plot.scatter(
        {
            pair: list(zip(truth[pair]["nats"], nats[pair]["nats"], strict=True))
            for pair in results["pairs"]
        },
        f"{results['subject']['model']}: KL divergence of each group alone, {shown} draws",
        f"true KL divergence, nats, sum over {results['count']} captions",
        "estimate, nats",
    )


def _methods(results: dict[str, Any]) -> list[str]:
    draws = _draws(results)
    shown = _SHOWN if _SHOWN in draws else max(draws)
    header = ["pair"]
    header += ["ModelOpt, padded on the left: rho"] if results["modelopt"] else []
    header += ["`gradient`: rho", *(f"`fisher`, {count}: rho" for count in draws)]
    header += [f"ratio at {shown}: median, 10 to 90 %", "within the 90 % interval", "verdicts"]
    rows = []
    for pair in results["pairs"]:
        best = results["methods"][f"fisher, {shown}"][pair]
        row = [f"`{pair}`"]
        row += [f"{results['modelopt'][pair]['rho']:.3f}"] if results["modelopt"] else []
        row.append(f"{results['methods']['gradient'][pair]['rho']:.3f}")
        row += [f"{results['methods'][f'fisher, {count}'][pair]['rho']:.3f}" for count in draws]
        row.append(f"{best['ratio']:.2f}, {best['ratio_10']:.2f} to {best['ratio_90']:.2f}")
        row.append(f"{best['covered']:.0%}" if "covered" in best else "")
        verdicts = best["verdicts"]
        row.append(", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts)))
        rows.append(row)
    return _table(header, rows)


def _cost(results: dict[str, Any]) -> list[str]:
    base, base_cpu = (results[key]["gradient"] for key in ("seconds", "cpu_seconds"))
    rows = [
        [
            f"`{name}`",
            f"{seconds:.2f}",
            f"{results['cpu_seconds'][name]:.2f}",
            f"{seconds / base:.2f}",
            f"{results['cpu_seconds'][name] / base_cpu:.2f}",
        ]
        for name, seconds in results["seconds"].items()
    ]
    machine = results["machine"].get("card") or results["machine"]["cpu"]
    header = ["method, all pairs", "seconds", "CPU seconds", "over `gradient`", "of CPU seconds"]
    return [f"On {machine}:", "", *_table(header, rows)]


def _recipes(title: str, entries: Sequence[dict[str, Any]]) -> list[str]:
    header = [
        title,
        "bits",
        "loss increase",
        "against ModelOpt",
        "KL, held out",
        "KL, scored captions",
        "sum of the estimates",
        "KL over the sum",
    ]
    rows = []
    for entry in entries:
        against = entry.get("against")
        rows.append(
            [
                entry["name"],
                f"{entry['bits']:.3f}",
                f"{entry['loss']:+.5f}",
                f"{against[0]:+.5f} ± {against[1]:.5f}" if against else "",
                f"{entry['divergence']:.5f}",
                f"{entry['scored']:.5f}",
                f"{entry['predicted']:.5f}",
                f"{entry['scored'] / entry['predicted']:.2f}",
            ]
        )
    return _table(header, rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _draws(results: dict[str, Any]) -> list[int]:
    names = [name for name in results["methods"] if name.startswith("fisher")]
    return [int(name.split(", ")[1]) for name in names]
