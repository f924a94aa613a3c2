"""Tables, Markdown, CSV, Parquet and one self-contained HTML page, from the files of a results folder alone.

    python -m jobs.report results/demo                  the report of a sweep
    python -m jobs.report results/before results/after  what differs between two

Needs no cluster, no model and no accelerator; run it again whenever the scoring or the looks change. Tasks
of lm-eval need their data, as lm-eval's scorers look at the whole document; where it is not there, the other
tasks are reported and the exit status is 2. With two folders, the exit status is that of diff: 0 the same
samples have the same answers, 1 they differ, 2 an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from jobs.disk.lines import DiskError
from jobs.disk.record import write_file
from jobs.reporting.compare import compare
from jobs.reporting.compare_report import print_comparison, write_comparison
from jobs.reporting.markdown import markdown
from jobs.reporting.page import html
from jobs.reporting.summary import Results, load
from jobs.reporting.tables import csv_text, lines_parquet, samples_parquet
from jobs.reporting.terminal import terminal
from spts.errors import ConfigError


def write_report(results: Results) -> Path:
    """Writes all files of the report into the results folder and returns the path of the page."""
    folder = results.folder
    write_file(folder / "report.md", markdown(results).encode())
    write_file(folder / "report.csv", csv_text(results).encode())
    write_file(folder / "report.parquet", lines_parquet(results))
    write_file(folder / "samples.parquet", samples_parquet(results))
    page = folder / "report.html"
    write_file(page, html(results).encode())
    return page


def main(argv: list[str] | None = None) -> int:
    """Writes and prints the report of a results folder, or what differs between two."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.report",
        description=main.__doc__,
        epilog="With two folders: compare.md and compare.html go into the second; "
        "exit status 0 = same answers, 1 = they differ, 2 = error.",
    )
    parser.add_argument("results", type=Path, help="folder that jobs.sweep wrote")
    parser.add_argument("other", type=Path, nargs="?", help="a second one, to compare with the first")
    options = parser.parse_args(argv)
    console = Console()
    try:
        if options.other is not None:
            comparison = compare(load(options.results), load(options.other))
            print_comparison(comparison, console)
            page, status = write_comparison(comparison), int(not comparison.equal)
        else:
            results = load(options.results)
            page, status = write_report(results), 2 if results.unscored else 0
            terminal(results, console)
    except (ConfigError, DiskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {page.resolve()}")
    return status


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["main", "terminal", "write_report"]
