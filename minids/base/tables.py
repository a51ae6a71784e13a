"""Tables of plain text."""


def format_table(rows: list) -> str:
    """Return rows as aligned columns, the first to the left and the others to the right.

    rows: lists of cells, each a text or an integer (shown with thousands separators); a row that is
        a text is printed as it is
    """
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row]
             for row in rows if not isinstance(row, str)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = iter([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
    return "\n".join(row if isinstance(row, str) else "  ".join(next(lines)).rstrip()
                     for row in rows)
