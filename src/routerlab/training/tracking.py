"""Whether W&B can be reached, and what our runs log there. Imports neither torch nor wandb."""

import os
import socket
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlparse

STEP = "trainer/global_step"  # the x axis of every curve
BEST = {"val/loss": "min", "val/bits_per_byte": "min", "val/accuracy": "max"}
LOAD_MAP = "val/router/load_by_layer_and_expert"


def wandb_mode() -> str:
    """``WANDB_MODE`` if it is not online; else online if there is a key and the server answers in
    3 s; else offline. W&B itself would prompt without a key and wait without a network.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return mode
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not (os.environ.get("WANDB_API_KEY") or _netrc_has(address.hostname)):
        return "offline"
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return "offline"
    return "online"


def _netrc_has(host: str | None) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc(path).authenticators(host or "") is not None
    except (OSError, NetrcParseError):
        return False
