"""`python -m evener.cli`: the same as the console script."""

from evener.cli.main import main

if __name__ == "__main__":
    main()
