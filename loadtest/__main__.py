"""`python -m loadtest URL`: the load test without the rest of Tandem."""

from __future__ import annotations

import sys

from cyclopts import App

from contracts.errors import ConfigError
from loadtest.commands import loadtest


def main() -> None:
    app = App(name="loadtest", help_format="plaintext", result_action="return_value")
    app.default(loadtest)
    try:
        status = app()
    except ConfigError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
