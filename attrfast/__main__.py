"""`python -m attrfast` is the command `attrfast`."""

from attrfast.cli import main

if __name__ == "__main__":
    main()
