"""``python -m calibrant``, as torchrun starts it."""

from calibrant.cli.main import main

if __name__ == "__main__":
    main()
