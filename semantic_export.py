"""Export a learned folder in the formats of other programs: python semantic_export.py --help."""

from mifo.cli.export import main

if __name__ == "__main__":
    main()
