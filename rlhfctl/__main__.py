"""`python -m rlhfctl` and the `rlhfctl` script: a Ctrl-C while the command line is still being imported ends it too."""

import sys


def main() -> None:
    try:
        from rlhfctl.cli.main import main as command

        command()
    except KeyboardInterrupt:
        if "--json" in sys.argv:
            print('{"schema": 1, "status": "interrupted", "exit_code": 130, "message": "interrupted"}')
        sys.exit(130)
    finally:
        # A Ctrl-C inside a string that python executes (a dataclass in the making) leaves a mark: under `python -m` it
        # would end by SIGINT and not with the exit code. The next such string takes the mark away.
        eval("0")


if __name__ == "__main__":
    main()
