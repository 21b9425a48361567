"""Draw boxes as a picture, to see a layout: python visual_box_mask.py --help."""

from mifo.cli.boxes import main

if __name__ == "__main__":
    main()
