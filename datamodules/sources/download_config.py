"""How images are fetched by URL: politely by default."""

from dataclasses import dataclass

from datamodules.sources.config import at_least

USER_AGENT = "kosmosg-data/1.0 (research data set; set user_agent= to a page or address of yours)"


@dataclass
class DownloadConfig:
    """A download."""

    column: str | None = None
    """Which URL of the list: Open Images `OriginalURL` (default, hash-checked) or `Thumbnail300KURL`, of another table
    its column."""
    connections: int = 16
    """Most requests under way at once."""
    host_connections: int = 2
    """Most requests under way at one host."""
    host_delay: float = 0.5
    """Seconds between the starts of two requests to one host."""
    timeout: float = 20.0
    """Seconds without an answer, and between two pieces of one, after which a request fails."""
    total_timeout: float = 120.0
    """Seconds after which a request fails whatever arrives."""
    retries: int = 2
    """Further attempts after a failure that may pass: time-outs, busy or broken servers."""
    max_wait: float = 600.0
    """Seconds; a host that asks (Retry-After) for more is given up for this run."""
    max_bytes: int = 32_000_000
    """Most bytes of one image."""
    user_agent: str = USER_AGENT
    """Who asks; a host's owner must be able to find you by it."""
    respect_opt_out: bool = True
    """Leave out images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex."""
    private_addresses: bool = False
    """Also ask hosts in private networks; a list from the web must not make this machine look around in yours."""
    try_dead_again: bool = False
    """Ask again for what an earlier run found gone for good."""
    limit: int | None = None
    """Rows of the list that are looked at; null: all."""

    def __post_init__(self):
        for name in ("connections", "host_connections", "max_bytes"):
            at_least(name, getattr(self, name), 1)
        for name in ("host_delay", "retries", "max_wait"):
            at_least(name, getattr(self, name), 0)
        for name in ("timeout", "total_timeout"):
            at_least(name, getattr(self, name), 0.1)
        if self.limit is not None:
            at_least("limit", self.limit, 1)
        if not self.user_agent.strip() or not self.user_agent.isprintable():
            raise ValueError(f"user_agent={self.user_agent!r} must be a line that tells who asks.")
