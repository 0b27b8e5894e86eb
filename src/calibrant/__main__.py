"""``python -m calibrant``, as torchrun starts it."""

from calibrant.cli.main import main

main()
