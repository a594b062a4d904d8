"""`gptutor` and `python -m gptutor`."""

import gc

gc.disable()  # what the imports make stays: searching it for garbage takes a tenth of the start

from gptutor.cli.main import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    main()
