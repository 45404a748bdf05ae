"""`evener devices`: what this host has and how fast it is."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from evener.cli.paths import writing
from evener.cli.shared_options import device_names
from evener.cost.rates import Profile
from evener.errors import InvalidDevice, InvalidInput
from evener.profile import load_profile, local_devices, measure, profile_path, save_profile
from evener.profile.table import show
from evener.spec.cluster import Cluster, parse_device


def devices(
    names: Annotated[list[str] | None, typer.Argument(help="Devices, like --devices.", show_default=False)] = None,
    device_options: Annotated[
        list[str] | None,
        typer.Option(
            "--devices",
            "--device",
            help="cpu:0, cpu:0-7, cuda:0, cpu:1,slowdown=2. Repeatable, or separated by spaces.",
            show_default="all of this host",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points, about half the time.")] = False,
    times: Annotated[
        int, typer.Option(min=1, max=20, help="Measure so often and keep the best of each figure: on a shared host.")
    ] = 1,
    stored: Annotated[bool, typer.Option("--stored", help="Show what was measured before; measure nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write the profile to this file as well.")] = None,
) -> None:
    """Measure devices and the collectives between them; default plans use the figures.

    Each device is measured alone and then all at once, since devices that share memory slow each other down.
    """
    if stored and (quick or times > 1):
        raise InvalidInput("--stored measures nothing; leave out --quick and --times")
    asked = device_names([*(device_options or []), *(names or [])])
    chosen = [parse_device(text) for text in asked] if asked else local_devices()
    seen: set[str] = set()
    for d in chosen:
        if d.name in seen:
            raise InvalidDevice(f"device {d.name} is named twice; name a second worker on it, like {d.name}#1")
        seen.add(d.name)
    cluster = Cluster(tuple(chosen))
    profile = _stored(cluster) if stored else _measure(cluster, quick, times, silent=as_json)
    if write is not None:
        with writing(write, "--write"):
            save_profile(profile, write)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(profile)).decode())
        return
    console = Console()
    show(profile, console)
    console.print(f"kept in {profile_path()}", highlight=False, soft_wrap=True)


def _stored(cluster: Cluster) -> Profile:
    profile = load_profile(cluster)
    if profile is None:
        names = " ".join(d.name for d in cluster.devices)
        raise InvalidInput(f"no profile in {profile_path()} covers {names} together; run `evener devices` to measure")
    return profile


def _measure(cluster: Cluster, quick: bool, times: int, silent: bool) -> Profile:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=silent) as bar:
        task = bar.add_task("starting", total=None)
        return measure(
            cluster,
            quick=quick,
            times=times,
            progress=lambda what, done, steps: bar.update(task, description=what, completed=done, total=steps),
        )
