"""Learn the instances of one picture: python semantic_learning.py --help."""

from mifo.cli.learning import main

if __name__ == "__main__":
    main()
