"""``python -m tenbit`` is the `tenbit` command."""

from tenbit.cli import main

if __name__ == "__main__":
    main()
