"""`python -m deltal`."""

from deltal.cli import main

if __name__ == "__main__":
    main()
