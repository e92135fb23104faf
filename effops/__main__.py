"""``python -m effops``: see `effops.cli`."""

from effops.cli import main

if __name__ == "__main__":
    main()
