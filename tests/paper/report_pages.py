"""Reports of made-up runs, read back as a browser would."""

from html.parser import HTMLParser
import pathlib
import subprocess
import sys

from resnet_jax.paper.report import write_report
from resnet_jax.paper.runs import find_runs, read_run


class Tables(HTMLParser):
    """The cells of every table by its section's heading; also checks that every element is closed."""

    def __init__(self, page: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self._open, self._heading = [], ""
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "h2" in self._open:
            self._heading = data
        elif {"td", "th"} & set(self._open):
            self.tables[self._heading][-1][-1] += data

    def row(self, table: str, name: str) -> dict[str, str]:
        """A row's cells by the head of their column; the remark's head is empty."""
        head, *rows = self.tables[table]
        (found,) = [row for row in rows if row[0] == name]
        return dict(zip(head[1:], found[1:], strict=True))


def report(tmp_path: pathlib.Path, *folders: pathlib.Path) -> Tables:
    runs = [read_run(folder) for folder in find_runs([str(folder) for folder in folders])]
    write_report(runs, tmp_path / "out")
    return Tables((tmp_path / "out" / "report.html").read_text())


def called(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    root = pathlib.Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "PATH": ""}
    command = [sys.executable, "-m", "resnet_jax.report", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
