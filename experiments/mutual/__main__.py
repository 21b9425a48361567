"""python -m experiments.mutual"""

from experiments.mutual.command import main

if __name__ == "__main__":
    main()
