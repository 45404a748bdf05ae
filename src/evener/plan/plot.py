"""Draws the Pareto front of a choice (matplotlib: the extra `plot`)."""

from pathlib import Path

from evener.errors import InvalidInput
from evener.plan.planner import Choice


def draw_front(choice: Choice, path: Path) -> None:
    """Capacity against p90 TTFT and p90 TPOT, one mark per plan. Raises InvalidInput (no matplotlib, no such place)."""
    try:
        import matplotlib
    except ImportError:
        raise InvalidInput("--plot needs matplotlib; install it with `pip install evener[plot]`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    named = {id(b.tried): b.name for b in choice.baselines if b.tried is not None}
    points = [choice.best, *choice.others]
    front = {id(t) for t in choice.front}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharex=True, layout="constrained")
    for axis, what in zip(axes, ("ttft", "tpot"), strict=True):
        for t in points:
            colour = "C3" if t is choice.best else "C0" if id(t) in front else "0.6"
            x, y = t.load.tokens_s, getattr(t, what).p90
            axis.scatter([x], [y], c=colour, marker="s" if id(t) in named else "o", zorder=3)
            label = named.get(id(t), t.plan.name)
            axis.annotate(label, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points", color=colour)
        axis.set_xlabel("capacity, output tokens/s (cost model)")
        axis.set_ylabel(f"p90 {what.upper()}, s (simulated)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"Chosen for {choice.goal}: {choice.best.plan.name} (red; blue: Pareto front; squares: usual layouts)"
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--plot {path}: {error}; give a path like front.png") from error
    finally:
        pyplot.close(figure)
