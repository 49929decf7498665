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


if __name__ == "__main__":
    main()
