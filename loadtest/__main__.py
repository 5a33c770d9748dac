"""`python -m loadtest URL`: the load test without the rest of Tandem."""

from __future__ import annotations

import sys

from cyclopts import App

from contracts.errors import ConfigError
from loadtest.commands import loadtest


def main() -> None:
    """Errors are one line each, without a traceback."""
    app = App(name="loadtest", help_format="plaintext")
    app.default(loadtest)
    try:
        status = app(sys.argv[1:], result_action="return_value")
    except ConfigError as error:
        for line in error.message.splitlines():
            print(f"loadtest: {line}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
