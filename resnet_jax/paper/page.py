"""What the report's pages are made of."""

import base64
import dataclasses

NONE = "–"  # noqa: RUF001  Where there is no figure.
MISSING = "not run"


@dataclasses.dataclass(frozen=True)
class Shown:
    """A table ready for the page: ``rows`` of cells, the first the row's name; ``rises`` where more is better."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    rises: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture ready for the page: ``svg`` or ``png``, its ``title`` and ``text``, and whether it is ``wide``."""

    title: str
    text: str
    svg: str = ""
    png: bytes = b""
    wide: bool = False

    def file(self, number: int) -> str:
        """Its name beside the Markdown page."""
        return f"figure_{number}.{'svg' if self.svg else 'png'}"

    @property
    def content(self) -> bytes:
        """What is in that file."""
        # Alone in its file a picture has no page to take its colour from.
        return self.svg.replace("<svg", '<svg style="color: #666"', 1).encode() if self.svg else self.png

    @property
    def address(self) -> str:
        """The PNG within the page itself."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def number(value: float | None, places: int = 2) -> str:
    """A figure, or the sign for none."""
    return NONE if value is None else f"{value:,.{places}f}"
