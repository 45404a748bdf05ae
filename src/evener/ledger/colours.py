"""One colour per cause, the same wherever a ledger is drawn: calm blues for useful time, loud colours for losses."""

from evener.ledger.causes import Cause

COLOURS: dict[Cause, str] = {
    Cause.PREFILL: "#2f6690",
    Cause.DECODE: "#81b1d5",
    # Computed in vain: purples.
    Cause.PADDING: "#b04fc4",
    Cause.RECOMPUTE: "#6a1b9a",
    Cause.SPECULATION: "#e29ae8",
    # Waiting for other devices: yellow to red.
    Cause.TRANSFER: "#f2c14e",
    Cause.STRAGGLER: "#d62828",
    Cause.BUBBLE: "#f77f00",
    # The host, and who else uses it.
    Cause.HOST: "#8c564b",
    Cause.CONTENDED: "#e7298a",
    # Work waits, and the device with it.
    Cause.KV_STARVED: "#7f0000",
    Cause.IMBALANCE: "#2a9d4a",
    Cause.HELD: "#a5b300",
    Cause.MIGRATION: "#00b8c4",
    # Nothing to lose: greys.
    Cause.NO_DEMAND: "#dcdcdc",
    Cause.DOWN: "#6e6e6e",
    Cause.UNATTRIBUTED: "#000000",
}
"""`#rrggbb`, as terminals, browsers and plots take it."""
