"""Keeps profiles in `~/.cache/evener/profiles`, one JSON file per host, processor and version.

`EVENER_CACHE` names another directory than `~/.cache/evener`. What is read is validated: a damaged file is an error
that says how to measure again, never a guess.
"""

import tempfile
from pathlib import Path

import msgspec
from msgspec import structs

from evener.cache import cache_dir
from evener.cost.rates import FORMAT, Profile, bind, hardware
from evener.errors import InvalidInput
from evener.profile.hardware import profile_key
from evener.spec.cluster import Cluster


def profile_path() -> Path:
    """Where this host's profile is kept."""
    return cache_dir() / "profiles" / f"{profile_key()}.json"


def load_profile(cluster: Cluster, path: Path | None = None) -> Profile | None:
    """The kept profile, bound to the cluster's workers; None when there is none that covers them.

    It covers them when each one's hardware was measured together with the others that can work at the same time.
    Raises InvalidInput naming the file and the remedy when the file is damaged.
    """
    stored = read_profile(path or profile_path())
    if stored is None:
        return None
    from evener.profile.measure import rounds

    known = {d.hardware or d.name: d for d in stored.devices}
    units = list({hardware(d): d for d in cluster.devices}.values())
    for group in rounds(units):
        names = {hardware(d) for d in group}
        for d in group:
            measured = known.get(hardware(d))
            if measured is None or not names <= {hardware(d), *measured.peers}:
                return None
    return bind(stored, cluster.devices)


def read_profile(path: Path) -> Profile | None:
    """A profile file as it is; None when it does not exist or has another version. Raises InvalidInput."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidInput(f"profile {path} cannot be read: {error}; delete it and run `evener devices`") from error
    try:
        if msgspec.json.decode(data, type=_Version).format != FORMAT:
            return None
        return msgspec.json.decode(data, type=Profile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidInput(f"profile {path} is damaged: {error}; run `evener devices` to measure again") from error


def save_profile(profile: Profile, path: Path | None = None) -> Path:
    """Write a profile for later; devices and collectives measured earlier and not now are kept beside it.

    A damaged file is replaced. The file appears whole or not at all.
    """
    path = path or profile_path()
    try:
        earlier = read_profile(path)
    except InvalidInput:
        earlier = None  # damaged, and measured again now: that is the remedy the error names
    if earlier is not None:
        names = {d.name for d in profile.devices}
        groups = {(c.transport, c.ranks) for c in profile.collectives}
        profile = structs.replace(
            profile,
            devices=profile.devices + tuple(d for d in earlier.devices if d.name not in names),
            collectives=profile.collectives
            + tuple(c for c in earlier.collectives if (c.transport, c.ranks) not in groups),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".profile-", delete=False) as f:
        f.write(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    Path(f.name).replace(path)
    return path


class _Version(msgspec.Struct):
    format: int
