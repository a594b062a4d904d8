"""`gptutor` and `python -m gptutor`."""

from gptutor.cli.main import main

if __name__ == "__main__":
    main()
