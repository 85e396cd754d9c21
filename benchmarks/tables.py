"""Writes a table to the terminal or as Markdown."""

import dataclasses

import rich.table


@dataclasses.dataclass
class Table:
    """Holds cells of text; the first column is aligned to the left, the others to the right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Appends a row."""
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append(cells)

    def rich(self) -> rich.table.Table:
        """Makes the table for a console."""
        table = rich.table.Table(title=self.title)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Writes the title, then the table."""
        lines = ["| " + " | ".join(self.columns) + " |", "|---" + "|--:" * (len(self.columns) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([f"{self.title}:", "", *lines])
