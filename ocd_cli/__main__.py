"""`python -m ocd_cli` is the same as `ocd`."""

from ocd_cli.app import main

if __name__ == "__main__":
    main()
