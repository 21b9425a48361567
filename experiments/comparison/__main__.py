"""python -m experiments.comparison"""

from experiments.comparison.command import main

if __name__ == "__main__":
    main()
