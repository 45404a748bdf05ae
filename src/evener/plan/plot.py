"""Draws the Pareto front of a choice (matplotlib: the extra `plot`)."""

from pathlib import Path

from evener.pictures import check_drawable, new_figure, save_figure
from evener.plan.planner import Choice


def draw_front(choice: Choice, path: Path) -> None:
    """Capacity against p90 TTFT and p90 TPOT, one mark per plan. Raises InvalidInput (see `pictures`)."""
    check_drawable(path, "--plot")

    named = {id(b.tried): b.name for b in choice.baselines if b.tried is not None}
    points = [choice.best, *choice.others]
    front = {id(t) for t in choice.front}
    figure = new_figure(11, 4.5, layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
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
    save_figure(figure, path, "--plot", dpi=150)
