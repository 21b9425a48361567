"""Measure how well learned instances are painted: python semantic_evaluation.py --help."""

from mifo.cli import evaluation
from semantic_synthesis import get_boxes


def main(argv: list[str] | None = None) -> None:
    evaluation.main(argv, get_boxes)


if __name__ == "__main__":
    main()
