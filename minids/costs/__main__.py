"""Costs: what a model weighs, what one token costs, and what its training costs, by arithmetic."""

from minids import costs
from minids.base.command_line import run_program


def main(argv: list[str] | None = None) -> None:
    """Print the tables of one configuration."""
    costs.main(argv)


if __name__ == "__main__":
    run_program("minids.costs", main)
