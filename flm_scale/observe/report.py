"""report.html: what a run did, as one page that opens from disk and needs nothing else.

In come the files of the run directory (run.json, metrics.jsonl, evals/*.json, samples/*); whatever is missing is left out of the page.
Charts are inline SVG whose colours and font are the page's own, so that they follow its light and its dark dress. Everything
that came from data (captions, keys) is escaped by the template.
"""

import base64
import io
import json
import math
import mimetypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from flm_scale.config import Run
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.errors import DataError
from flm_scale.observe.metrics import read_metrics
from flm_scale.observe.progress import clock

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]

EXPLANATIONS = {
    "flm": "Free Language Modeling reads each caption once from the left and once from the right beside its picture, then asks a small "
           "reconstructor for every single token, each with a span of neighbours of its own hidden. Every token of every caption "
           "teaches at every step, where masked language modelling learns only from the tokens it hides, and hiding more spoils the rest.",
    "mlm": "Masked language modelling hides a share of each caption's tokens and predicts them from the rest and the picture. It is the "
           "baseline of Free Language Modeling, which predicts every token at every step.",
    "ar": "Autoregressive language modelling predicts each token of a caption from those before it and the picture. It is a "
          "baseline of Free Language Modeling, which also reads from the right and fills hidden spans from both sides.",
    "prefix_lm": "Prefix language modelling shows the beginning of a caption whole and predicts the rest from the left, beside the picture. It "
                 "is a baseline of Free Language Modeling, which predicts every token at every step.",
    "captioning": "A bridge turns each picture into a few vectors in front of the caption, and a language model that never changes predicts the "
                  "caption's tokens from the left. Only the bridge, and the tower where it is not frozen, learn.",
}

# Stand-ins that matplotlib draws with; `themed` turns them into the page's CSS colours.
SERIES = tuple(f"#00f00{i}" for i in range(6))
INK, GRID = "#00f0a0", "#00f0b0"
TIME_COLORS = (SERIES[1], SERIES[0], SERIES[2], SERIES[3])
MOST_POINTS = 240
"""Points of a line; longer runs are averaged down to it."""


class Line(NamedTuple):
    """One curve of a chart."""

    label: str
    steps: list[float]
    values: list[float]
    color: int
    validation: bool = False


@dataclass(frozen=True)
class Chart:
    """A finished chart: its picture, and for the legend (label, colour, last value, last validation value) of each curve."""

    title: str
    note: str
    svg: str
    legend: list[tuple[str, int, str, str]]


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html and return its path.

    Raises DataError when run_dir holds no run or one of its files is damaged.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    if not (run_dir / "run.json").is_file():
        raise DataError(f"{run_dir} has no run.json; name the folder of a run, the --run-dir of flm train")
    try:
        run = Run.model_validate_json((run_dir / "run.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{run_dir / 'run.json'} is not JSON; restore it from a checkpoint of the run") from error
    metrics = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").is_file() else []
    steps, validation = [line for line in metrics if "loss" in line], [line for line in metrics if "validation/loss" in line]
    vqa = read_json(run_dir / "evals/vqa.json")
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"hundred": hundred, "piece": readable, "svg": Markup}
    page = environment.get_template("report.html").render(
        run=run, run_dir=run_dir, explanation=EXPLANATIONS[run.objective.kind], facts=facts(run, metrics),
        tiles=tiles(run, steps, validation), charts=charts(steps, validation), samples=read_samples(run_dir), vqa=vqa,
        vqa_chart=vqa_chart(vqa), caption=read_json(run_dir / "evals/caption.json"), retrieval=read_json(run_dir / "evals/retrieval.json"))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def read_json(path: Path) -> Any:  # noqa: ANN401 - whatever the evaluation wrote
    """Return a file's content, None when there is none. Raises DataError when it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); delete it or make it again with flm eval") from error


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Return the samples, each picture as a data URI."""
    samples = []
    for sample in read_json(run_dir / "samples/samples.json") or []:
        picture = run_dir / sample["image"]
        kind = mimetypes.guess_type(picture.name)[0] or "image/png"
        uri = f"data:{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}" if picture.is_file() else ""
        samples.append(sample | {"picture": uri})
    return samples


def facts(run: Run, metrics: Rows) -> list[tuple[str, str]]:
    """Return the header's list of (what, value). A line of the metrics may carry the number of 'parameters'."""
    vision, text, batch, optim = run.vision, run.text, run.batch, run.optim
    tower = f"ViT, width {vision.width}, {vision.layers} layers, patch {vision.patch_size}" if vision.kind == "vit" else vision.name
    merged = f" · {', '.join(map(str, vision.merged))} rows merged behind each block" if any(vision.merged) else ""
    clip = f" · {vision.frames} frames" if vision.frames > 1 else ""
    if isinstance(text, LanguageModelConfig):
        reads = f"{text.name} · frozen · behind a bridge of width {text.bridge.width}, {text.bridge.layers} layers, {text.bridge.reducer.kind}"
    else:
        reads = f"width {text.width}, {text.heads} heads · {text.bottom_layers} + {text.fusion_layers} layers"
        if run.objective.kind == "flm":
            reads += f", reconstructor {text.reconstructor_bottom_layers} + {text.reconstructor_fusion_layers}"
    engine = run.parallel.engine + (f" ZeRO {run.parallel.zero}" if run.parallel.engine == "deepspeed" else "")
    parameters = [line["parameters"] for line in metrics if line.get("parameters")]
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}"
                         for name, value in run.objective.model_dump(exclude={"kind"}).items() if not isinstance(value, bool))
    return [
        ("Objective", run.objective.kind.replace("_", " ").upper() + (f" · {settings}" if settings else "")),
        ("Vision", f"{tower} · {vision.image_size} px{clip}{'' if vision.trainable else ' · frozen'}{merged}"),
        ("Text", reads),
        *([("Parameters", f"{parameters[0] / 1e6:,.1f} million")] if parameters else []),
        ("Step", f"{batch.micro_batches} micro-batches: {batch.text_tokens:,} tokens, {batch.captions} captions, {batch.images} pictures at most"),
        ("Optimizer", f"{optim.kind.upper()} · peak rate {optim.lr:g} · {optim.schedule}, {optim.warmup_steps} warm-up steps"),
        ("Engine", f"{engine} · {run.precision} · seed {run.seed}"),
        ("Data", str(run.data.path) + (f" · {run.data.manifest_hash[:12]}" if run.data.manifest_hash else "")),
    ]


def tiles(run: Run, steps: Rows, validation: Rows) -> list[tuple[str, str, str]]:
    """Return the headline numbers: (value, what it is, small print). Rates leave out the first step, which warms up."""
    if not steps:
        return []
    last, steady = steps[-1], steps[1:] or steps
    found = [(f"{last['step']:,}", "steps", f"of {run.steps:,}")]
    if validation and (scores := [(name, value) for name, value in validation[-1].items() if "/accuracy/" in name and value is not None]):
        name, value = scores[0]
        found.append((f"{value:.1%}", "accuracy, " + name.rpartition("/")[2], f"validation, step {validation[-1]['step']:,}"))
    if last["loss"] is not None:
        found.append((f"{last['loss']:.3f}", "training loss", "last step"))
    if rates := [line["pairs_per_s"] for line in steady if line.get("pairs_per_s")]:
        found.append((f"{median(rates):,.0f}", "pairs a second", "median"))
    if shares := [line["mfu"] for line in steady if line.get("mfu")]:
        found.append((f"{median(shares):.1%}", "of peak FLOPs", "median utilisation"))
    seconds = sum(line.get("seconds") or 0 for line in steps)
    if seconds:
        waited = sum(line.get("data_wait_s") or 0 for line in steps)
        found.append((clock(seconds), "training time", f"{waited / seconds:.1%} of it waiting for data"))
    return found


def charts(steps: Rows, validation: Rows) -> list[Chart]:
    """Return the charts of the training run, those for which there is something to show."""
    if len(steps) < 2:
        return []
    found = []
    for name, title, note in (("loss", "Loss by part", "nats a token, lower is better"),
                              ("accuracy", "Accuracy by part", "targets whose most likely token is the right one")):
        parts = [key.partition("/")[2] for key in (steps[-1] | (validation or [{}])[-1]) if key.startswith(f"{name}/")]
        lines = [line for color, part in enumerate(parts) for line in (
            curve(steps, f"{name}/{part}", part, color), curve(validation, f"validation/{name}/{part}", part, color, validation=True))]
        found.append(line_chart(title, note, lines, percent=name == "accuracy"))
    for name, title, note, color in (("lr", "Learning rate", "of weights that start from random", 3),
                                     ("grad_norm", "Gradient norm", "before clipping, log scale", 1),
                                     ("pairs_per_s", "Throughput", "image-text pairs a second", 2),
                                     ("mfu", "Model FLOPs utilisation", "useful arithmetic over the hardware's peak", 0)):
        found.append(line_chart(title, note, [curve(steps, name, title, color)], log=name == "grad_norm", percent=name == "mfu",
                                smooth=name != "lr"))
    found.append(time_chart(steps))
    return [chart for chart in found if chart is not None]


def curve(lines: Rows, name: str, label: str, color: int, *, validation: bool = False) -> Line:
    """Return the values that the metrics lines have under a name."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return Line(label, [float(step) for step, _ in points], [float(value) for _, value in points], color, validation)


def line_chart(title: str, note: str, lines: list[Line], *, percent: bool = False, log: bool = False, floor: float | None = None,
               smooth: bool = True, x_label: str = "step") -> Chart | None:
    """Draw curves: training as a line through its noise, validation as rings on a dashed line. None when there is nothing to draw."""
    lines = [line for line in lines if line.steps]
    if not lines:
        return None

    def draw(axes: "Axes") -> None:
        for line in lines:
            color = SERIES[line.color % len(SERIES)]
            steps, values = averaged(line.steps), averaged(line.values)
            if not smooth:
                axes.plot(steps, values, color=color, linewidth=1.7)
            elif line.validation:
                axes.plot(steps, values, color=color, linewidth=1.1, linestyle=(0, (3, 2)), marker="o", markersize=4,
                          markerfacecolor="none")
            else:
                axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
                axes.plot(steps, smoothed(values), color=color, linewidth=1.7)
        if floor is not None:
            axes.axhline(floor, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        if log:
            axes.set_yscale("log")
        elif floor is None:
            axes.set_ylim(0, 1.08 * max(max(line.values) for line in lines) or 1)
        label_axes(axes, percent=percent, x_label=x_label)

    return Chart(title, note, themed_svg(draw, name=title), legend(lines, percent=percent))


def legend(lines: list[Line], *, percent: bool) -> list[tuple[str, int, str, str]]:
    """Return (label, colour, last value, last validation value) of each label; a missing value is empty."""
    shown: dict[str, tuple[str, int, str, str]] = {}
    for line in lines:
        value = f"{line.values[-1]:{'.1%' if percent else '.3g'}}"
        label, color, last, last_validation = shown.get(line.label, (line.label, line.color % len(SERIES), "", ""))
        shown[line.label] = (label, color, last, value) if line.validation else (label, color, value, last_validation)
    return list(shown.values())


def time_chart(steps: Rows) -> Chart | None:
    """Draw where the time of a step goes, as shares that stand on each other."""
    names = [name for name in steps[-1] if name.startswith("time/")]
    rows = [line for line in steps if all(line.get(name) is not None for name in names)]
    if not names or not rows:
        return None
    shares = {name.partition("/")[2].replace("_", " "): [float(line[name]) for line in rows] for name in names}

    def draw(axes: "Axes") -> None:
        axes.stackplot(averaged([float(line["step"]) for line in rows]), *map(averaged, shares.values()), colors=TIME_COLORS,
                       linewidth=0, alpha=0.8)
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        label_axes(axes, percent=True, x_label="step")

    entries = [(name, SERIES.index(TIME_COLORS[i % len(TIME_COLORS)]), f"{sum(values) / len(values):.1%}", "")
               for i, (name, values) in enumerate(shares.items())]
    return Chart("Where the time goes", "share of each step, bottom to top", themed_svg(draw, name="time"), entries)


def vqa_chart(vqa: Any) -> Chart | None:  # noqa: ANN401 - a JSON file's content
    """Draw the VQA score after each pass, for every start, with the floor."""
    if not vqa or not all(len(row.get("by_pass") or []) > 1 for row in vqa["rows"]):
        return None
    lines = [Line(row["start"], [float(i + 1) for i in range(len(row["by_pass"]))], [float(value) for value in row["by_pass"]], color)
             for color, row in enumerate(vqa["rows"])]
    return line_chart("Score after each pass", "dotted: the floor", lines, percent=True, floor=vqa["floor"]["overall"], smooth=False,
                      x_label="pass")


def averaged(values: list[float]) -> list[float]:
    """Return at most MOST_POINTS values, each the mean of neighbours."""
    size = math.ceil(len(values) / MOST_POINTS)
    return [sum(values[i:i + size]) / len(values[i:i + size]) for i in range(0, len(values), size)]


def smoothed(values: list[float]) -> list[float]:
    """Return the mean of about a fifteenth of the values around each one, of fewer towards the ends, so that nothing lags behind."""
    reach, last = len(values) // 30, len(values) - 1
    windows = [(i, min(reach, i, last - i)) for i in range(len(values))]
    return [sum(values[i - half:i + half + 1]) / (2 * half + 1) for i, half in windows]


def label_axes(axes: "Axes", *, percent: bool, x_label: str) -> None:
    """Quiet axes: horizontal rules, few ticks, no box."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    low, high = axes.get_ylim()
    digits = 1 if percent and high - low < 0.1 else 0
    small = 0 < high < 1e-2  # learning rates: 3e-04 is easier to read than 0.0003
    form = f".{digits}%" if percent else ".1e" if small else "g"
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form) if value else "0"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"))
    axes.set_xlabel(x_label, loc="right")
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, which="both")


def themed_svg(draw: Callable[["Axes"], None], *, name: str) -> str:
    """Return an inline SVG in the page's colours and font, the same text for the same numbers. name: keeps the ids of two charts apart."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.2), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg"):]
    # The page sets the size; numbered ids would occur again in the next chart, and metadata names matplotlib's web address.
    svg = re.sub(r' (width|height)="[\d.]+pt"| id="[a-zA-Z0-9.]+_\d+"|<metadata>.*?</metadata>', "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, variable in [*((color, f"s{i}") for i, color in enumerate(SERIES)), (INK, "quiet"), (GRID, "rule")]:
        svg = svg.replace(stand_in, f"var(--{variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def hundred(value: object) -> str:
    """Return a score of the range 0..1 as 67.0, or a dash when there is none."""
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) else "-"


def readable(piece: str) -> str:
    """Return a sentencepiece token as one reads it: a word without its mark, a continuation with a hyphen before it."""
    if piece.startswith("▁"):
        return piece[1:] or "␣"
    return f"-{piece}" if piece[:1].isalnum() else piece
