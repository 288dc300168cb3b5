"""What people see of a run: tables in the terminal, plots, one HTML file; losses are printed like wins."""

from __future__ import annotations

import base64
import itertools
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .outcome import BACKEND, CHECK, PEER, Results, Row
from .timing import DISTURBED, Quartiles

PEERS = {"eager": "torch eager", "fused": "torch's best fused call", "compile": "torch.compile"}
Cell = tuple[str, str]  # text and style


@dataclass
class Sheet:
    """A table, for the terminal and for the HTML file; text columns come first, numbers after."""

    title: str
    columns: list[str]
    texts: int
    rows: list[list[Cell]]


def print_provenance(results: Results, console: Console) -> None:
    """Where the results come from, in two lines."""
    origin, versions = results.provenance, results.provenance["fastdl"]
    commit = f"commit {origin['commit'][:12]}{' with changes' if origin['dirty'] else ''}" if origin["commit"] else ""
    driver = f"driver {origin['driver']}, CUDA {origin['cuda']}" if origin["driver"] else f"{origin['threads']} threads"
    console.print(f"[bold]{origin['device']}[/], {driver}; {origin['system']}; {origin['time']}", highlight=False)
    numbers = f"fastdl {versions['fastdl']}, torch {versions['torch']}, triton {versions['triton']}"
    native = versions.get("cpu kernels", "no compiled CPU kernels")
    console.print(f"{numbers}; {native}; {commit or 'commit unknown'}", highlight=False)


def print_all(results: Results, console: Console) -> None:
    """Every table, then the summary."""
    for sheet in sheets(results):
        table = Table(title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, column in enumerate(sheet.columns):
            table.add_column(column, justify="left" if i < sheet.texts else "right", no_wrap=i != 1)
        for row in sheet.rows:
            table.add_row(*[Text(text, style) for text, style in row])
        console.print(table)
    for line, style in summary(results):
        console.print(Text(line, style))


def sheets(results: Results, peers: bool = False) -> list[Sheet]:
    """The tables that have rows; with ``peers``, torch's own calls have rows as well."""
    every = [_checks(results), _speeds(results, peers), _models(results)]
    return [sheet for sheet in every if sheet.rows]


def summary(results: Results) -> list[Cell]:
    """Failures, every loss, what auto declined, what was left out, the verdict."""
    failures: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.failures:
        failures.setdefault((row.family, row.backend, row.problem), []).append(row)
    lines = []
    for (family, backend, problem), rows in failures.items():
        more = f" and {len(rows) - 1} more of {family}" if len(rows) > 1 else ""
        lines.append((f"FAILED on {backend}: {rows[0].title}{more}: {problem}", "bold red"))
    comparisons = sum(len(row.over) for row in results.of(BACKEND))
    losses = sorted(results.losses(), key=lambda loss: loss[2].median)
    if comparisons:
        lines.append((f"{len(losses)} of {comparisons} comparisons lost{':' if losses else ''}", "bold"))
    for row, peer, ratio in losses:
        name = f"{PEERS[peer]}{f' ({row.fused})' if peer == 'fused' else ''}"
        noise = ", within noise" if ratio.third >= 1 else ""
        mark = " !" if (row.others or 0) > DISTURBED else ""
        style = "dim" if noise else "red"
        lines.append((f"  {ratio.median:.2f}x of {name}{noise}: {row.title}, {row.backend}{mark}", style))
    declined: dict[str, list[str]] = {}
    for row in results.of(BACKEND):
        if row.backend == "auto" and "torch" in row.runs:
            declined.setdefault(row.reason, []).append(row.title)
    lines += [(f"auto took torch in {len(titles)} cases: {reason}", "") for reason, titles in declined.items()]
    disturbed = {row.title: row.others for row in results.of(BACKEND) if row.others and row.others > DISTURBED}
    if disturbed:
        most = f"{max(disturbed.values()):.0%}"
        lines.append((f"others took up to {most} of the machine during {len(disturbed)} cases (marked !)", "yellow"))
    lines += [(f"note: {note}", "") for note in results.notes]
    if results.passed:
        return [*lines, ("everything is within its bounds", "bold green")]
    return [*lines, ("NOT everything is within its bounds", "bold red")]


def write_files(results: Results, out: Path) -> None:
    """speedup.png, roofline.png and report.html, which has every picture in ``out`` inside."""
    from jinja2 import Environment

    if results.of(BACKEND):
        _draw_speedups(results, out / "speedup.png")
        _draw_roofline(results, out / "roofline.png")
    pictures = {
        path.stem: base64.b64encode(path.read_bytes()).decode() for path in sorted(out.glob("*.png"), reverse=True)
    }
    page = Environment(autoescape=True).from_string(_TEMPLATE)
    text = page.render(
        origin=results.provenance, sheets=sheets(results, True), summary=summary(results), pictures=pictures
    )
    (out / "report.html").write_text(text)


# ----------------------------------------------------------------------------------------------------------- tables


def _checks(results: Results) -> Sheet:
    """One line a family, backend and dtype."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.of(CHECK):
        groups.setdefault((row.family, row.backend, row.dtype), []).append(row)
    lines = []
    for (family, backend, dtype), rows in groups.items():
        runs = ", ".join(dict.fromkeys(name for row in rows for name in row.runs.split("+") if name))
        worst = max((row.share for row in rows), default=0.0)
        failed = sum(not row.passed for row in rows)
        counts = str(len(rows)), str(sum(len(row.errors) for row in rows)), f"{worst:.0%}"
        verdict = (f"{failed} failed", "bold red") if failed else ("yes", "green")
        lines.append(
            [(family, ""), (backend, "bold"), (runs, ""), (dtype, ""), *[(text, "") for text in counts], verdict]
        )
    columns = ["family", "backend", "runs on", "dtype", "cases", "outputs and gradients", "error/bound", "right"]
    return Sheet("correctness on small ragged shapes, against float64", columns, 4, lines)


def _speeds(results: Results, peers: bool) -> Sheet:
    compared = [peer for peer in PEERS if any(peer in row.over for row in results.rows)]
    columns = ["family", "case", "dtype", "pass", "backend", "auto", "error/bound", "right", "time"]
    columns += [f"x {peer}" for peer in compared] + ["GFLOP/s", "GB/s", "roofline", "memory"]
    lines = []
    for row in results.rows:
        if row.kind == CHECK or (row.kind == PEER and not peers):
            continue
        ours = row.kind == BACKEND
        direction = row.direction.replace("forward", "fwd").replace("backward", "bwd")
        line: list[Cell] = [(text, "") for text in (row.family, row.case, row.dtype, direction)]
        line += [(row.backend, "bold" if ours else "dim"), (row.auto, ""), (f"{row.share:.0%}", "")]
        line += [("yes", "green") if row.passed else ("NO", "bold red")]
        line += [(_time(row.time) + (" !" if (row.others or 0) > DISTURBED else ""), "")]
        line += [_ratio(row.over.get(peer)) for peer in compared]
        line += [(_number(rate and rate / 1e9), "") for rate in (row.flops_rate, row.bytes_rate)]
        line += [(f"{row.roofline:.0%}" if row.roofline else "-", "")]
        line += [("-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB", "")]
        lines.append(line)
    rates = ", ".join(f"{dtype} {_number(rate / 1e9)} GFLOP/s" for dtype, rate in results.flops.items())
    ceilings = f"ceilings measured in this run: {_number((results.bandwidth or 0) / 1e9)} GB/s, {rates}"
    return Sheet(f"speed: above 1 fastdl is the faster, below 1 the slower\n{ceilings}", columns, 6, lines)


def _models(results: Results) -> Sheet:
    lines = []
    for model in results.models:
        cells = [model["model"], model["backend"], model["ran"], str(model["steps"])]
        cells += [f"{model['seconds']:.2f} s", f"{model['torch seconds']:.2f} s"]
        cells += [f"{model[key]:.1%}" for key in ("accuracy", "torch accuracy", "accuracy bound")]
        cells += [f"{model[key]:.1e}" for key in ("loss difference", "loss difference bound")]
        verdict = ("yes", "green") if model["passed"] else ("NO", "bold red")
        lines.append([*[(text, "") for text in cells], verdict])
    columns = ["model", "backend", "runs on", "steps", "time", "torch's", "test accuracy", "torch's", "at least"]
    columns += ["loss differs by", "at most", "right"]
    return Sheet("trained beside torch from the same weights on the same batches", columns, 3, lines)


def _ratio(ratio: Quartiles | None) -> Cell:
    return (f"{ratio.median:.2f}", "green" if ratio.median >= 1 else "red") if ratio else ("-", "")


def _number(value: float | None) -> str:
    return (
        "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"
    )


def _time(time: Quartiles | None) -> str:
    if time is None:
        return "-"
    return f"{time.median * 1e3:.3f} ms" if time.median >= 1e-3 else f"{time.median * 1e6:.1f} us"


# ------------------------------------------------------------------------------------------------------------ plots


def _draw_speedups(results: Results, path: Path) -> None:
    """A bar for each backend and case: speed over torch eager, with a mark at its speed over the best fused call."""
    from matplotlib.figure import Figure

    rows = [row for row in results.of(BACKEND) if "eager" in row.over][::-1]
    figure = Figure(figsize=(10, 1.5 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        ratio = row.over["eager"]
        axes.barh(y, ratio.median - 1, left=1, color="tab:green" if ratio.median >= 1 else "tab:red")
        axes.plot([ratio.first, ratio.third], [y, y], color="black", lw=1)
        if "fused" in row.over:
            axes.plot(row.over["fused"].median, y, "D", color="tab:blue", ms=4)
    axes.plot([], [], "D", color="tab:blue", ms=4, label="over torch's best fused call")
    axes.plot([], [], color="black", lw=1, label="middle half of the rounds")
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel="times as fast as torch eager (bars)", title=results.provenance["device"])
    axes.set_yticks(range(len(rows)), [f"{row.title}, {row.backend}" for row in rows], fontsize=7)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _draw_roofline(results: Results, path: Path) -> None:
    """Operations a byte against rate, each case on torch eager and on each backend, below the roofs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    bandwidth = results.bandwidth or 1.0
    colors = dict(zip(results.flops, itertools.cycle(("tab:blue", "tab:orange", "tab:green")), strict=False))
    markers = {"torch eager": "x", "cpu": "o", "triton": "^", "cuda": "s"}
    for row in results.rows:
        if row.backend in markers and row.roofline and row.flops_rate and row.bytes_rate:
            at = row.flops_rate / row.bytes_rate, row.flops_rate / 1e9
            axes.plot(*at, markers[row.backend], color=colors[row.dtype], mfc="none")
    low, high = axes.get_xlim()
    for dtype, peak in results.flops.items():
        corners = [max(low, 1e-1), peak / bandwidth, max(high, 4 * peak / bandwidth)]
        axes.plot(corners, [min(peak, x * bandwidth) / 1e9 for x in corners], color=colors[dtype], label=dtype)
    for name in dict.fromkeys(row.backend for row in results.rows if row.backend in markers and row.roofline):
        axes.plot([], [], markers[name], color="grey", mfc="none", label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of the least traffic", ylabel="GFLOP/s")
    axes.set_title(f"{results.provenance['device']}: roofs measured in this run")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastdl on {{ origin.device }}</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1300px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 12px } th, td { padding: 2px 8px; text-align: left }
th { border-bottom: 2px solid #999; position: sticky; top: 0; background: #fff } td { border-bottom: 1px solid #ddd }
.red { color: #c00 } .green { color: #070 } .bold { font-weight: bold } .dim { color: #888 } .yellow { color: #a60 }
img { max-width: 100% } p { margin: 0 }
</style></head><body>
<h1>fastdl on {{ origin.device }}</h1>
<h2>Summary</h2>
{% for text, style in summary %}<p class="{{ style }}">{{ text }}</p>
{% endfor %}{% for name, data in pictures.items() %}
<h2>{{ name }}</h2><img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor %}{% for sheet in sheets %}
<h2>{{ sheet.title }}</h2><table><tr>{% for column in sheet.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}<tr>{% for text, style in row %}<td class="{{ style }}">{{ text }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
<h2>Provenance</h2><table>{% for key, value in (origin.items() | list) + (origin.fastdl.items() | list) %}
{% if key != "fastdl" or value is string %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endif %}{% endfor %}
</table></body></html>
"""
