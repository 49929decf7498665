"""`python -m rlhfctl` is the `rlhfctl` command."""

from rlhfctl.cli.main import main

if __name__ == "__main__":
    main()
