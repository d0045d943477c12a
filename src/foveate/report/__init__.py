"""One HTML file that a person opens, reads and mails: nothing is loaded, all text is escaped.

    report(profile)               what one model does with its attention on one text
    report(profile, other)        two texts, two models, or before and after, side by side

`page.py` puts the file together, `data.py` says what goes in, `pack.py` makes it small, `charts.py` holds the figures;
`page/` has the template, the style and the scripts.
"""

from foveate.report.page import report, write

__all__ = ["report", "write"]
